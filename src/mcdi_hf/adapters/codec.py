"""Adapter tensors to normalised weight tokens and back."""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig

from ..backbones.frozen import FrozenBackbone
from ..data.episodes import SupportBatch
from .head import Head, class_means, imprint_head
from .layout import AdapterLayout
from .stacked import StackedLora


class AdapterCodec(ModelMixin, ConfigMixin):
    """Writes an adapter as tokens of unit variance, residual to what is free, and reads it back.

    What is free is the mean adapter of the training tasks and a head imprinted from the support set; tokens of zero
    stand for exactly these. A class's token holds a gain on its free row of the head, and what is left: where few shots
    say little, most of what a prototype is has to go, which a gain says in one number. Adapters of a layout without a
    head are LoRA tokens alone. The layout is in the config, the statistics are buffers that stay float32 on load.

    Args:
        layout (`dict`): [`AdapterLayout.to_dict`].
        lora_config (`dict`): `LoraConfig.to_dict()` of the adapters.
        base_model (`dict`): `name_or_path`, `revision`, `fingerprint`, `pooling`, `max_length` and `model_class` of
            the backbone that the adapters are for.
        imprint_scale (`float`, *optional*, defaults to 10.0): The sharpness of the imprinted head, see [`imprint_head`].
    """

    _keep_in_fp32_modules = ["mean", "std", "head_std"]

    @register_to_config
    def __init__(self, layout: dict, lora_config: dict, base_model: dict, imprint_scale: float = 10.0) -> None:
        super().__init__()
        self.layout = AdapterLayout.from_dict(layout)
        tokens = self.layout.tokens
        width = torch.tensor([token.width for token in tokens])
        filled = torch.arange(self.layout.token_dim) < width.unsqueeze(-1)
        self.register_buffer("filled", filled, persistent=False)
        self.register_buffer("mean", torch.zeros(len(tokens), self.layout.token_dim))
        self.register_buffer("std", torch.ones(len(tokens), 1))
        self.register_buffer("head_std", torch.ones(3))  # of the weight, the bias, and the gain

    def _apply(self, fn: Callable, recurse: bool = True) -> "AdapterCodec":
        """Move, but never change the dtype: in bfloat16 the statistics would lose what the residuals are made of."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @classmethod
    def from_backbone(
        cls, backbone: FrozenBackbone, lora_config: LoraConfig, token_dim: int = 768, imprint_scale: float = 10.0
    ) -> "AdapterCodec":
        """Build the codec of the adapters that a `LoraConfig` makes for a live backbone; no adapter is needed.
        `token_dim` is the width of a token."""
        layout = AdapterLayout.from_model(backbone.model, lora_config, backbone.head_name, token_dim)
        config = lora_config.to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return cls(layout.to_dict(), config, backbone.record, imprint_scale).eval()

    @property
    def num_lora_tokens(self) -> int:
        return len(self.mean)

    def num_tokens(self, ways: int) -> int:
        """How many tokens an adapter for `ways` classes has."""
        return self.num_lora_tokens + (ways if self.layout.head_keys else 0)

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Refuse a backbone other than the one that the adapters are for, naming both, and a LoRA config that does not make
        the layout."""
        backbone.check(self.config.base_model)
        self.layout.check_lora_config(backbone.model, self.config.lora_config, backbone.head_name)

    def fit_matrices(self, adapters: list[dict[str, torch.Tensor]]) -> None:
        """Take the mean adapter of training tasks' adapters, key -> `(n, *shape)`, and one scale of the residual for each
        LoRA matrix. Finer scales would blow up coordinates that hardly move.
        """
        for tensors in adapters:
            self.layout.check(tensors)
        lora = torch.cat([self._cut(tensors) for tensors in adapters])
        self.mean.copy_(lora.mean(dim=0))
        squares = (lora - self.mean).square().mean(dim=0)
        owners = [(token.layer, token.module, token.matrix) for token in self.layout.tokens]
        for owner in dict.fromkeys(owners):
            rows = torch.tensor([other == owner for other in owners])
            self.std[rows] = squares[rows].sum().div(self.filled[rows].sum()).sqrt().clamp(min=1e-8)

    def fit_head(self, adapters: list[dict[str, torch.Tensor]], heads: list[Head]) -> None:
        """Take the scales of the head's residual to the imprinted heads of the same tasks: of weight, bias and gain."""
        parts = zip(*(self._residual(tensors, head) for tensors, head in zip(adapters, heads)))
        for place, residuals in enumerate(parts):
            residuals = torch.cat([residual.flatten() for residual in residuals])
            self.head_std[place] = residuals.square().mean().sqrt().clamp(min=1e-8)

    def encode(self, tensors: dict[str, torch.Tensor], head: Head | None = None) -> torch.Tensor:
        """Write adapters, key on disk -> `(adapters, *shape)`, as tokens `(adapters, num_tokens(classes),
        token_dim)`. Their heads, of any number of classes, are residual to the imprinted `head`, which is `None`
        for a layout without one.
        """
        self.layout.check(tensors)
        self._check_head(head)
        lora = (self._cut(tensors) - self.mean) / self.std
        if head is None:
            return lora
        weight, bias, gain = (part / std for part, std in zip(self._residual(tensors, head), self.head_std))
        rows = torch.cat([weight, bias.unsqueeze(-1), gain.unsqueeze(-1)], dim=-1)
        rows = torch.nn.functional.pad(rows, (0, self.layout.token_dim - rows.shape[-1]))
        return torch.cat([lora, rows], dim=1)

    def decode(self, tokens: torch.Tensor, head: Head | None = None) -> dict[str, torch.Tensor]:
        """Read adapters from tokens: the inverse of [`AdapterCodec.encode`], in the dtype of the statistics."""
        self._check_head(head)
        classes = 0 if head is None else head[0].shape[1]
        if tokens.shape[1] != self.num_tokens(classes):
            raise ValueError(
                f"There are {tokens.shape[1]} tokens an adapter: expected {self.num_tokens(classes)}, of which {classes} "
                "are of a head."
            )
        tokens = tokens.to(self.mean.dtype)
        lora, rows = tokens.split([self.num_lora_tokens, classes], dim=1)
        tensors = self.decode_matrices(lora)
        if head is None:
            return tensors
        feature_dim = self.layout.feature_dim
        gain = 1 + rows[..., feature_dim + 1] * self.head_std[2]
        free = head[0] * gain.unsqueeze(-1), head[1] * gain
        residuals = rows[..., :feature_dim], rows[..., feature_dim]
        for key, residual, part, std in zip(self.layout.head_keys, residuals, free, self.head_std):
            tensors[key] = part + residual * std
        return tensors

    def decode_matrices(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Read the LoRA matrices only: key -> `(adapters, *shape)`, from tokens with or without those of a head."""
        return self._join(tokens[:, : self.num_lora_tokens].to(self.mean.dtype) * self.std + self.mean)

    def complete(
        self, tokens: torch.Tensor, support: SupportBatch, stacked: StackedLora | None = None
    ) -> dict[str, torch.Tensor]:
        """Read whole adapters, key on disk -> `(adapters, *shape)`, from tokens `(adapters, num_tokens(classes),
        token_dim)`: their heads, if they have any, are residual to one imprinted from the support.

        With `stacked` it is imprinted from what each adapter makes of its support's examples, in a pass of their
        own, without it from the support's features under the mean adapter.
        """
        if not self.layout.head_keys:
            return self.decode(tokens)
        scale = self.config.imprint_scale
        if stacked is not None:
            return self.decode(tokens, stacked.free_heads(support, scale, self.decode_matrices(tokens)))
        means = class_means(support.features, support.labels, support.class_mask.shape[1]).to(self.mean.dtype)
        return self.decode(tokens, imprint_head(means, scale, support.class_mask))

    def mean_adapter(self, count: int = 1) -> dict[str, torch.Tensor]:
        """The LoRA matrices of the mean adapter, `count` times: key -> `(count, *shape)`, without a head."""
        return self._join(self.mean.expand(count, -1, -1))

    def frozen_adapter(self, count: int) -> dict[str, torch.Tensor]:
        """LoRA matrices that leave the backbone as it is, `count` times: key -> `(count, *shape)`."""
        return {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in self.mean_adapter(count).items()}

    def token_mask(self, class_mask: torch.Tensor) -> torch.Tensor:
        """Which numbers of the tokens mean something: class mask `(adapters, classes)` -> `bool` tensor of shape
        `(adapters, num_tokens(classes), token_dim)`.
        """
        lora = self.filled.expand(len(class_mask), -1, -1)
        if not self.layout.head_keys:
            return lora
        row = torch.arange(self.layout.token_dim, device=class_mask.device) <= self.layout.feature_dim + 1
        return torch.cat([lora, class_mask.unsqueeze(-1) & row], dim=1)

    def _residual(
        self, tensors: dict[str, torch.Tensor], head: Head
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the head is beyond the free one: weight, bias, and the gain, which leaves the smallest weight."""
        (weight, bias), (free, free_bias) = (tensors[key] for key in self.layout.head_keys), head
        norm = free.square().sum(dim=-1)
        gain = torch.where(norm > 0, (weight * free).sum(dim=-1) / norm, 1.0)  # padding has no free row
        return weight - gain.unsqueeze(-1) * free, bias - gain * free_bias, gain - 1

    def _check_head(self, head: Head | None) -> None:
        if (head is None) == bool(self.layout.head_keys):
            expected = "the free head that its residual is of" if head is None else "no free head"
            raise ValueError(f"The head of the adapters is {self.layout.head_name!r}: expected {expected}.")

    def _cut(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        pieces = []
        for key in self.layout.lora_shapes:
            values = tensors[key].transpose(-1, -2) if key.endswith(".lora_B.weight") else tensors[key]
            values = values.flatten(1)
            pieces.append(torch.nn.functional.pad(values, (0, -values.shape[1] % self.layout.token_dim)))
        return torch.cat(pieces, dim=1).unflatten(1, (-1, self.layout.token_dim))

    def _join(self, lora: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors, start = {}, 0
        for key, shape in self.layout.lora_shapes.items():
            numel = shape[0] * shape[1]
            count = -(-numel // self.layout.token_dim)
            values = lora[:, start : start + count].flatten(1)[:, :numel]
            start += count
            if key.endswith(".lora_B.weight"):
                tensors[key] = values.unflatten(1, shape[::-1]).transpose(-1, -2)
            else:
                tensors[key] = values.unflatten(1, shape)
        return tensors
