"""One place in a live PEFT model that generated adapters take in turn."""

import os

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from ..adapters.generated import GeneratedAdapter, as_adapter


# What PEFT computes a module's scaling from; nothing else in a config changes what the same tensors do.
SCALING_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class AdapterSlot:
    """Swaps generated adapters into one place of a live `PeftModel`: their tensors are copied, and nothing else is
    done.

    The parameters are looked up once, so whatever holds them goes on with the new adapter. An adapter that is
    deleted and added anew has new parameters and needs a new slot. `adapter_name` must be the active adapter, since
    the model's labels become those of what is swapped in.

    Example: `slot = AdapterSlot(adapter.load_into(model)); slot.swap("me/other-adapter")`
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        if adapter_name not in model.peft_config:
            raise ValueError(f"The model has no adapter {adapter_name!r}: expected one of {list(model.peft_config)}.")
        self.model = model
        self.adapter_name = adapter_name
        # PEFT itself says which parameter a key on disk is; they stay what they are when the model changes its device.
        self._parameters = get_peft_model_state_dict(
            model, dict(model.named_parameters()), adapter_name, save_embedding_layers=False
        )
        self._shapes = {key: tuple(parameter.shape) for key, parameter in self._parameters.items()}
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._base = model.get_base_model()

    @torch.no_grad()
    def swap(self, adapter: GeneratedAdapter | str | os.PathLike) -> None:
        """Write an adapter, or that of a folder or a Hub id, over the one that is there: LoRA matrices, head and the names
        of the labels.

        The adapter must be for a backbone of the same name, for the same LoRA config and number of classes, and the
        one in the model neither merged nor inactive; otherwise it is a `ValueError` and nothing has changed.
        """
        adapter = as_adapter(adapter)
        self._check_ready()
        self._check(adapter)
        torch._foreach_copy_(list(self._parameters.values()), [adapter.tensors[key] for key in self._parameters])
        config = self._base.config
        config.id2label, config.label2id = adapter.id2label, adapter.label2id

    def _check_ready(self) -> None:
        if self.model.active_adapters != [self.adapter_name]:
            raise ValueError(
                f"The active adapters are {self.model.active_adapters}: call model.set_adapter({self.adapter_name!r}) "
                "before a swap."
            )
        if any(self.adapter_name in layer.merged_adapters for layer in self._layers):
            raise ValueError(
                f"The adapter {self.adapter_name!r} is merged into the backbone: call model.unmerge_adapter() before a "
                "swap."
            )

    def _check(self, adapter: GeneratedAdapter) -> None:
        config, tensors = self.model.peft_config[self.adapter_name], adapter.tensors
        found = adapter.base_model["model_class"], adapter.base_model["name_or_path"]
        wanted = type(self._base).__name__, config.base_model_name_or_path
        if found != wanted:
            raise ValueError(
                f"The adapter is for the {found[0]} {found[1]!r}, the model is the {wanted[0]} {wanted[1]!r}."
            )
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != self._shapes:
            found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            other = {key: found.get(key) for key in found | self._shapes if found.get(key) != self._shapes.get(key)}
            wanted = {key: self._shapes.get(key) for key in other}
            raise ValueError(f"The adapter does not fit the model: it has {other}, expected {wanted}.")
        for field in SCALING_FIELDS:
            if adapter.lora_config[field] != getattr(config, field):
                raise ValueError(
                    f"The adapter's {field} is {adapter.lora_config[field]}, the model's {getattr(config, field)}: the "
                    "same tensors would be scaled otherwise."
                )
