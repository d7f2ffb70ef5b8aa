"""The layout is PEFT's: which tensors an adapter has, how they are scaled, and how they are cut into tokens."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import LORA_SETTINGS, random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterLayout


@pytest.mark.parametrize("settings", LORA_SETTINGS)
def test_layout_is_that_of_peft(settings: dict) -> None:
    backbone, config = tiny_backbone(), tiny_lora_config(**settings)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    layout = AdapterLayout.from_model(backbone.model, config)
    assert backbone.model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in backbone.model.state_dict().items())
    model = get_peft_model(backbone.classifier(num_labels=3), config)
    expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    assert layout.lora_shapes | dict(zip(layout.head_keys, [(3, 16), (3,)])) == expected
    for module in layout.modules:
        assert module.scaling == model.base_model.model.get_submodule(module.name).scaling["default"]
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again.to_dict() == layout.to_dict() and again.tokens == layout.tokens


def test_a_module_has_one_token_as_wide_as_its_rank() -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(r=4, rank_pattern={"value": 1}))
    assert [(token.layer, token.module, token.width) for token in layout.tokens] == [
        (layer, module, width) for layer in (1, 2) for module, width in ((0, 4), (1, 1))
    ]
    assert layout.token_dim == 4


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"]), "pooler.*in modules_to_save the head"),
        (LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["word_embeddings"]), "only nn.Linear"),
        (tiny_lora_config(bias="lora_only"), "bias='lora_only': expected 'none'"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(config: LoraConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterLayout.from_model(tiny_backbone("default").model, config)


def test_an_adapter_without_a_head_has_lora_matrices_alone() -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(task_type=None))
    assert layout.head_keys == () and layout.keys == list(layout.lora_shapes)
    assert AdapterLayout.from_dict(layout.to_dict()).to_dict() == layout.to_dict()
    tensors = {key: torch.zeros(2, *shape) for key, shape in layout.shapes(5).items()}
    layout.check(tensors)
    with pytest.raises(ValueError, match="unexpected .*classifier.weight"):
        layout.check(tensors | {"base_model.model.classifier.weight": torch.zeros(2, 5, 16)})


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


def test_single_adapters_are_stacked_and_cut_apart_again() -> None:
    for settings in ({}, {"task_type": None}):
        layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(**settings))
        ways = [2, 4, 3]
        adapters = [
            {key: value[0] for key, value in random_adapters(layout, 1, classes, seed=classes).items()}
            for classes in ways
        ]
        stack = layout.stack(adapters, ways=5)
        layout.check(stack)
        assert {key: tuple(value.shape[1:]) for key, value in stack.items()} == layout.shapes(5)
        assert all(not stack[key][0, 2:].any() for key in layout.head_keys)  # padding
        for one, expected in zip(layout.unstack(stack, ways), adapters, strict=True):
            assert one.keys() == expected.keys() and all(one[key].equal(expected[key]) for key in one)
            # safetensors write no views, and an adapter must not follow the stack that it was cut from
            assert all(
                value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in one.values()
            )


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": 400}, {"r": 3}, {"target_modules": ["key"]}, {"rank_pattern": {"value": 1}}, {"use_rslora": True}],
)
def test_a_lora_config_that_does_not_make_the_layout_is_refused(change: dict) -> None:
    model, config = tiny_backbone().model, tiny_lora_config()
    layout = AdapterLayout.from_model(model, config)
    layout.check_lora_config(model, config.to_dict(), "classifier")
    with pytest.raises(ValueError, match=r"adapts or scales other modules than the layout: .*layer\.1"):
        layout.check_lora_config(model, config.to_dict() | change, "classifier")
