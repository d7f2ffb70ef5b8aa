"""Adapters in the basis of the shared one: few numbers to generate, and exact LoRA."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig
from torch import nn

from ..backbones.frozen import FrozenBackbone
from ..data.episodes import SupportBatch
from .head import RidgeHead
from .layout import MATRICES, AdapterLayout
from .stacked import StackedLora


class AdapterCodec(ModelMixin, ConfigMixin):
    """Writes an adapter as one token for each adapted module, residual to the shared adapter, and reads it back.

    With `lora_A` and `lora_B` of the shared adapter, a generated one is `lora_B diag(z) lora_A`: LoRA whose `lora_A` is
    `diag(z) lora_A`. A token is `(z - 1) / std`. Tokens of zero are the shared adapter, z = 0 leaves the backbone as it
    is. The head is no part of the tokens: [`RidgeHead`] makes it of what the adapter sees in the support set. The layout
    and the head are in the config. Basis and scales are buffers that stay float32, on load and whatever dtype the codec is
    moved to; `dtype` is what was asked for.

    Args:
        layout (`dict`): [`AdapterLayout.to_dict`].
        lora_config (`dict`): `LoraConfig.to_dict()` of the adapters.
        base_model (`dict`): `name_or_path`, `revision`, `fingerprint`, `pooling`, `max_length` and `model_class` of
            the backbone that the adapters are for.
        head (`dict`, *optional*): The fields of [`RidgeHead`]; by default its defaults.

    Example: `codec.decode(codec.encode(z), support, stacked)` gives whole adapters of coefficients z
    """

    _keep_in_fp32_modules = ["basis", "std"]

    @register_to_config
    def __init__(self, layout: dict, lora_config: dict, base_model: dict, head: dict | None = None) -> None:
        super().__init__()
        self.layout = AdapterLayout.from_dict(layout)
        self.head = RidgeHead(**(head or {}))
        self.basis = nn.ModuleList()
        for module in self.layout.modules:
            pair = nn.Module()
            for matrix in MATRICES:
                pair.register_buffer(matrix, torch.zeros(module.shape(matrix)))
            self.basis.append(pair)
        ranks = torch.tensor([module.rank for module in self.layout.modules])
        filled = torch.arange(self.layout.token_dim) < ranks.unsqueeze(-1)
        self.register_buffer("filled", filled, persistent=False)
        self.register_buffer("std", torch.ones(len(ranks), 1))
        self.register_buffer("asked", torch.empty(0), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "AdapterCodec":
        """Move, but never change the dtype: in bfloat16 the basis would lose what the residuals are made of."""
        asked = fn(self.asked)
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        self.asked = asked
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the codec was moved to, as of any other component; its numbers stay float32."""
        return self.asked.dtype

    @classmethod
    def from_backbone(
        cls, backbone: FrozenBackbone, lora_config: LoraConfig, head: RidgeHead | None = None
    ) -> "AdapterCodec":
        """Build the codec of the adapters that a `LoraConfig` makes for a live backbone. Its basis is empty until
        [`AdapterCodec.set_shared_adapter`]."""
        layout = AdapterLayout.from_model(backbone.model, lora_config, backbone.head_name)
        config = lora_config.to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return cls(layout.to_dict(), config, backbone.record, head and asdict(head)).eval()

    @property
    def num_tokens(self) -> int:
        return len(self.std)

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Refuse a backbone other than the one that the adapters are for, naming both, and a LoRA config that does not make
        the layout."""
        backbone.check(self.config.base_model)
        self.layout.check_lora_config(backbone.model, self.config.lora_config, backbone.head_name)

    def set_shared_adapter(self, tensors: dict[str, torch.Tensor], head: RidgeHead) -> None:
        """Take the LoRA matrices of the shared adapter, key on disk -> `(1, *shape)`, as the basis, and the head that
        was learnt with it."""
        if {key: tuple(value.shape[1:]) for key, value in tensors.items()} != self.layout.lora_shapes:
            raise ValueError(f"The tensors {sorted(tensors)} are not the LoRA matrices of the layout: expected these.")
        for module, pair in zip(self.layout.modules, self.basis):
            for matrix in MATRICES:
                getattr(pair, matrix).copy_(tensors[module.key(matrix)][0])
        self.head = RidgeHead(**{name: float(value) for name, value in asdict(head).items()})
        self.register_to_config(head=asdict(self.head))

    def fit_scales(self, coefficients: torch.Tensor) -> None:
        """Take one scale of `z - 1` for each module from the coefficients `(adapters, num_tokens, token_dim)` of
        training tasks' adapters."""
        squares = ((coefficients - 1).square() * self.filled).mean(dim=0).sum(dim=1, keepdim=True)
        self.std.copy_((squares / self.filled.sum(dim=1, keepdim=True)).sqrt().clamp(min=1e-8))

    def encode(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients z as tokens, `(..., num_tokens, token_dim)` both; zero behind a module's rank."""
        return (coefficients - 1) / self.std * self.filled

    def coefficients(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as coefficients z, the inverse of [`AdapterCodec.encode`], in the dtype of the basis."""
        return 1 + tokens.to(self.std.dtype) * self.std

    def matrices(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """The LoRA matrices, key on disk -> `(adapters, *shape)`, of coefficients `(adapters, num_tokens,
        token_dim)`."""
        shared = {
            module.key(matrix): getattr(pair, matrix).unsqueeze(0)
            for module, pair in zip(self.layout.modules, self.basis)
            for matrix in MATRICES
        }
        return self.layout.scaled(shared, coefficients)

    def read(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The coefficients of adapters, key on disk -> `(adapters, *shape)`, with or without heads: the inverse of
        [`AdapterCodec.matrices`], which refuses adapters that are not written in the basis."""
        found = torch.ones(len(next(iter(tensors.values()))), *self.filled.shape, device=self.std.device)
        for token, (module, pair) in enumerate(zip(self.layout.modules, self.basis)):
            rows = tensors[module.key("lora_A")]
            own = (rows * pair.lora_A).sum(dim=2) / pair.lora_A.square().sum(dim=1)
            same = torch.allclose(own.unsqueeze(-1) * pair.lora_A, rows, rtol=1e-3, atol=1e-5)
            if not same or not torch.allclose(tensors[module.key("lora_B")], pair.lora_B):
                raise ValueError(
                    f"{module.name} is not written in the basis of the shared adapter: expected diag(z) A."
                )
            found[:, token, : module.rank] = own
        return found

    def decode(self, tokens: torch.Tensor, support: SupportBatch, stacked: StackedLora) -> dict[str, torch.Tensor]:
        """Read whole adapters, key on disk -> `(adapters, *shape)`, from tokens `(adapters, num_tokens, token_dim)`.
        Their heads, if they have any, are made of what each adapter sees in its support's examples."""
        return self.complete(self.matrices(self.coefficients(tokens)), support, stacked)

    def complete(
        self, tensors: dict[str, torch.Tensor], support: SupportBatch, stacked: StackedLora
    ) -> dict[str, torch.Tensor]:
        """Add to LoRA matrices, key on disk -> `(adapters, *shape)`, the heads that each makes of its support."""
        if not self.layout.head_keys:
            return tensors
        return tensors | dict(zip(self.layout.head_keys, stacked.heads(support, self.head, tensors)))

    def shared_adapter(self, count: int = 1) -> dict[str, torch.Tensor]:
        """The LoRA matrices of the shared adapter, `count` times: key -> `(count, *shape)`, without a head."""
        return self.matrices(torch.ones(count, *self.filled.shape, device=self.std.device))

    def frozen_adapter(self, count: int = 1) -> dict[str, torch.Tensor]:
        """LoRA matrices that leave the backbone as it is, `count` times: key -> `(count, *shape)`."""
        return self.matrices(torch.zeros(count, *self.filled.shape, device=self.std.device))
