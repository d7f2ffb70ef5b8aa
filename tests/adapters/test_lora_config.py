"""LoRA configs of a newer PEFT than the one that is there."""

import pytest
from tiny import tiny_lora_config

from mcdi_hf.adapters.lora_config import read_lora_config


def test_options_of_a_newer_peft_are_left_out_if_they_are_off() -> None:
    saved = tiny_lora_config(r=4, use_rslora=True).to_dict()
    newer = saved | {"of_2030": None, "of_2031": False, "of_2032": []}
    assert read_lora_config(newer).to_dict() == read_lora_config(saved).to_dict() == saved
    with pytest.raises(ValueError, match="PEFT does not know the LoRA option 'of_2033': pip install --upgrade peft"):
        read_lora_config(newer | {"of_2033": {"alpha": 1}})
