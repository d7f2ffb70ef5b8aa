"""What a layout must leave alone, and what its check must see, beside `test_layout_and_codec.py`."""

import pytest
import torch
from tiny import random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterLayout


def test_the_config_of_the_caller_stays_as_it_was() -> None:
    """PEFT writes the backbone's name into the config that it is given, and fills in the targets."""
    config, untouched = tiny_lora_config(), tiny_lora_config()
    AdapterLayout.from_model(tiny_backbone().model, config)
    assert config.to_dict() == untouched.to_dict()


@pytest.mark.parametrize("position", [0, -1], ids=["a LoRA matrix", "the bias of the head"])
def test_stacks_of_different_sizes_are_refused_by_the_name_of_the_tensor(position: int) -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config())
    tensors = random_adapters(layout, 2)
    key = layout.keys[position]
    with pytest.raises(ValueError, match=f"{key} holds 3 adapters, the others 2"):
        layout.check(tensors | {key: torch.cat([tensors[key], tensors[key][:1]])})


@pytest.mark.parametrize("part, shape", [(0, (2, 3, 15)), (1, (2, 4))], ids=["width", "classes"])
def test_a_head_that_does_not_fit_is_refused_by_its_name(part: int, shape: tuple[int, ...]) -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config())
    key = layout.head_keys[part]
    with pytest.raises(ValueError, match=f"{key} has shape"):
        layout.check(random_adapters(layout, 2) | {key: torch.zeros(shape)})
