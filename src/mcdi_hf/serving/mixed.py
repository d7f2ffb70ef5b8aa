"""Many generated adapters served from one frozen backbone: each row of a batch names its own."""

import difflib
import math
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..adapters.generated import GeneratedAdapter, as_adapter
from ..adapters.head import head_logits
from ..adapters.layout import AdapterLayout
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone


@dataclass
class MixedAdaptersOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(rows, classes)`): As wide as the adapter with the most classes among those
            named; minus infinity where a row's has fewer.
        labels (`list[str]`): Each row's likeliest class, by its name.

    Example: `mixed(["where is my parcel"], ["shop"]).labels`
    """

    logits: torch.Tensor
    labels: list[str]


class MixedAdapters:
    """Holds any number of adapters of one layout, such as `pipe.codec.layout`, on one frozen backbone, and runs
    batches in which each row names its adapter.

    All adapters lie in two tensors, a row each: one of LoRA matrices, one of heads. When all rows are taken, their
    number doubles. A causal language model's adapters have no head: the verbalizer of their labels stands in for
    it. Threads may call, add and drop as they like: they take turns.

    Example: `mixed = MixedAdapters(pipe.backbone, pipe.codec.layout); mixed.add("shop", adapter); mixed(["a text"],
    ["shop"])`
    """

    def __init__(self, backbone: FrozenBackbone, layout: AdapterLayout) -> None:
        self.backbone = backbone
        self.layout = layout
        self.stacked = StackedLora(backbone, layout)
        self._lora_configs: list[dict] = []  # those that were found to fit the layout
        self._stored: dict[str, tuple[int, list[str]]] = {}  # name -> its row, its labels
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._lora = torch.empty(0, layout.numel, device=backbone.device)
        self._heads = torch.empty(0, 0, layout.feature_dim + 1, device=backbone.device)  # weights, then the bias

    @property
    def names(self) -> list[str]:
        """The names of the adapters that are there, the oldest first."""
        return list(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def labels(self, name: str) -> list[str]:
        """The class names of an adapter, in the order of its logits."""
        self._check_known([name])
        return list(self._stored[name][1])

    def add(self, name: str, adapter: GeneratedAdapter | str | os.PathLike) -> None:
        """Add an adapter of this backbone and layout, or that of a folder or a Hub id, for any number of classes, under a
        name that is not taken.

        Raises:
            `ValueError`: when the name is taken, when the adapter is of another backbone, layout or scaling, when it
                holds NaN or inf, or when its labels do not fit its head. Nothing has changed then.
        """
        adapter = as_adapter(adapter)
        with self._lock:
            if name in self._stored:
                raise ValueError(f"There is an adapter {name!r} already: replace it, or drop it first.")
            lora, head = self._read(adapter)
            if not self._free:
                self._grow(max(8, 2 * len(self._lora)), self._heads.shape[1])
            self._write(self._free.pop(), name, lora, head, adapter.labels)

    def replace(self, name: str, adapter: GeneratedAdapter | str | os.PathLike) -> None:
        """Put another adapter, which may have other classes, in the place of one that is there. Raises as `add` does."""
        adapter = as_adapter(adapter)
        with self._lock:
            self._check_known([name])
            self._write(self._stored[name][0], name, *self._read(adapter), adapter.labels)

    def drop(self, name: str) -> None:
        """Forget an adapter; its place is taken by the next one that is added."""
        with self._lock:
            self._check_known([name])
            self._free.append(self._stored.pop(name)[0])

    @torch.no_grad()
    def __call__(self, examples: list[Any], names: list[str]) -> MixedAdaptersOutput:
        """Classify a batch of texts, pairs of texts or PIL images, each row by the adapter that `names` has for it, in
        one pass. An example that stands in several rows runs through the layers below the first adapted one once.

        Returned is a [`MixedAdaptersOutput`]. A `ValueError` says that there are no examples, another number of
        names, or names of adapters that are not there.
        """
        if not examples or len(examples) != len(names):
            raise ValueError(
                f"There are {len(examples)} examples and {len(names)} names of adapters: expected one or more examples "
                "and a name for each."
            )
        with self._lock:  # hooks carry the adapters of a batch to the backbone
            return self._answer(examples, names)

    def _answer(self, examples: list[Any], names: list[str]) -> MixedAdaptersOutput:
        self._check_known(names)
        slots, labels = zip(*(self._stored[name] for name in names))
        slots, ways = torch.tensor(slots, device=self._lora.device), torch.tensor(list(map(len, labels)))
        encoded = self.stacked.encode(examples)
        features = self.stacked.features(self._matrices(slots), encoded[torch.arange(len(examples))])
        heads = self._heads[slots, : int(ways.max())]
        class_mask = torch.arange(heads.shape[1]) < ways.unsqueeze(-1)
        logits = head_logits(features, heads[..., :-1], heads[..., -1], class_mask.to(heads.device)).squeeze(1)
        best = logits.argmax(dim=-1).tolist()
        return MixedAdaptersOutput(logits=logits, labels=[own[index] for own, index in zip(labels, best)])

    def _matrices(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """The LoRA matrices of each row: key on disk -> `(rows, *shape)`."""
        shapes = self.layout.lora_shapes
        parts = self._lora.split([math.prod(shape) for shape in shapes.values()], dim=1)
        # One matrix after the other: fetched at once they are one block so large that every call maps fresh memory.
        picked = (part.index_select(0, slots) for part in parts)
        return {key: part.unflatten(1, shape) for (key, shape), part in zip(shapes.items(), picked)}

    def _read(self, adapter: GeneratedAdapter) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's LoRA matrices `(numbers,)` and its head `(classes, feature_dim + 1)`, once it is known to fit."""
        self.backbone.check(adapter.base_model)
        self.layout.check({key: tensor.unsqueeze(0) for key, tensor in adapter.tensors.items()})
        if adapter.lora_config not in self._lora_configs:  # equal configs are looked at once
            self.layout.check_lora_config(self.backbone.model, adapter.lora_config, self.backbone.head_name)
            self._lora_configs.append(adapter.lora_config)
        if self.layout.head_keys:
            weight, bias = (adapter.tensors[key] for key in self.layout.head_keys)
        else:
            weight, bias = self.backbone.verbalizer(tuple(adapter.labels))
        if len(weight) != len(adapter.labels):
            raise ValueError(f"The adapter has {len(adapter.labels)} labels {adapter.labels}, its head {len(weight)}.")
        lora = torch.cat([adapter.tensors[key].flatten() for key in self.layout.lora_shapes])
        head = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        if not (torch.isfinite(lora).all() and torch.isfinite(head).all()):
            raise ValueError("The adapter holds NaN or inf.")
        return lora, head

    # The storage outlives whatever mode the caller is in, and must stay writable in every other.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(self, slot: int, name: str, lora: torch.Tensor, head: torch.Tensor, labels: list[str]) -> None:
        if len(head) > self._heads.shape[1]:
            self._grow(len(self._lora), max(len(head), 2 * self._heads.shape[1]))
        self._lora[slot].copy_(lora)
        self._heads[slot, : len(head)].copy_(head)
        self._stored[name] = (slot, list(labels))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grow(self, slots: int, classes: int) -> None:
        """Make room for so many adapters of so many classes; doubling copies each adapter only a few times in all."""
        lora = self._lora.new_empty(slots, self._lora.shape[1])
        heads = self._heads.new_zeros(slots, classes, self._heads.shape[2])
        lora[: len(self._lora)].copy_(self._lora)
        heads[: len(self._heads), : self._heads.shape[1]].copy_(self._heads)
        self._free += range(len(self._lora), slots)
        self._lora, self._heads = lora, heads

    def _check_known(self, names: list[str]) -> None:
        if unknown := [name for name in dict.fromkeys(names) if name not in self._stored]:
            nearest = difflib.get_close_matches(str(unknown[0]), self.names, n=3, cutoff=0)
            raise ValueError(f"There are no adapters {unknown}: expected names that were added, such as {nearest}.")
