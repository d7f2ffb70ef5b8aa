"""LoRA configs between versions of PEFT."""

from dataclasses import fields
from typing import Any

from peft import LoraConfig


def read_lora_config(saved: dict[str, Any]) -> LoraConfig:
    """The `LoraConfig` of what `LoraConfig.to_dict` gave, in whichever version of PEFT.

    A newer PEFT saves options that this one does not know. Those that are off (`None`, `False` or empty) are left out.
    A `ValueError` names one that is on: without it the adapter would be another.
    """
    known = {field.name for field in fields(LoraConfig)}
    if unknown := [name for name, value in saved.items() if name not in known and value]:
        raise ValueError(f"PEFT does not know the LoRA option {unknown[0]!r}: pip install --upgrade peft.")
    return LoraConfig(**{name: value for name, value in saved.items() if name in known})
