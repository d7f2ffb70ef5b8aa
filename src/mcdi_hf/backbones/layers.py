"""A backbone cut below its first adapted layer: the lower part runs once an example, the upper one many times."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.encoded import EncodedExamples
from .frozen import FrozenBackbone
from .hidden_states import cache_name, cached_states


_LAYER = re.compile(r"\.(\d+)\.")  # the index of a layer in a module's name


class _Capture(nn.Module):
    """Keeps the states that reach a layer, in whose place it stands."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # ModernBERT and Qwen make the mask of a layer by it
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.states = hidden_states
        return hidden_states


class LowerLayers:
    """The frozen part of a backbone below its adapted layers, which all lie in one stack of layers."""

    def __init__(self, backbone: FrozenBackbone, module_names: list[str]) -> None:
        path, first = split_point(backbone.model, module_names)
        self.backbone = backbone
        self.place = f"{path}.{first}"
        self.capture = _Capture(backbone.model.get_submodule(self.place))
        model = _shared_copy(backbone.model)
        setattr(model, backbone.head_name, nn.Identity())
        parent, _, name = path.rpartition(".")
        layers = nn.ModuleList([*model.get_submodule(path)[:first], self.capture])
        setattr(model.get_submodule(parent), name, layers)
        self.model = model

    @torch.no_grad()
    def __call__(
        self,
        examples: list[Any],
        batch_size: int = 64,
        num_views: int = 1,
        on_batch: Callable[[int], None] | None = None,
        cache_dir: str | Path | None = None,
    ) -> EncodedExamples:
        """Run the lower layers over examples, see [`FrozenBackbone.tokens`], in batches of similar length.

        `views * n` examples are all `n` as they are, then other views of each. With `cache_dir` the hidden states
        are memory-mapped from a file there, so they may be larger than the memory, and are read again, to the bit,
        for the same examples, weights and layers; without it they stay in memory. `on_batch` is called after each
        pass with the number of its examples, and once for all that were read.
        """
        if not examples or len(examples) % num_views:
            raise ValueError(f"There are {len(examples)} examples of {num_views} views: expected a multiple of it.")
        on_batch = on_batch or (lambda count: None)
        starts = counts = None
        if self.backbone.reads_images:
            inputs, length = examples, len(examples)
            batches = (examples[first : first + batch_size] for first in range(0, len(examples), batch_size))
            batches = map(self.backbone.inputs, batches)
        else:
            # A text that is labelled by several attributes, or in several data sets, is one text here.
            places = {example: place for place, example in enumerate(dict.fromkeys(examples))}
            inputs = self.backbone.tokens(list(places))
            counts = torch.tensor([len(ids) for ids in inputs["input_ids"]])
            order, length = counts.argsort(stable=True), int(counts.sum())
            starts = torch.empty_like(counts)
            starts[order] = counts[order].cumsum(0) - counts[order]
            batches = (self._batch(inputs, rows) for rows in order.split(batch_size))
        states = self._states(batches, on_batch)
        if cache_dir is None:
            hidden_states = torch.cat(list(states))
        else:
            path = Path(cache_dir) / cache_name(self.backbone, self.place, inputs, batch_size)
            hidden_states, was_there = cached_states(path, states, length, self.backbone.model.dtype)
            if was_there:
                on_batch(len(examples))
        if counts is not None:
            used = torch.tensor([places[example] for example in examples])
            starts, counts = starts[used], counts[used]
        return EncodedExamples(hidden_states, self.backbone.device, starts, counts, num_views)

    def _batch(self, tokens: dict[str, list], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone.pad({key: [values[row] for row in rows.tolist()] for key, values in tokens.items()})

    def _states(
        self, batches: Iterator[dict[str, torch.Tensor]], on_batch: Callable[[int], None]
    ) -> Iterator[torch.Tensor]:
        """The hidden states of each batch, of texts those of its tokens without the padding."""
        for batch in batches:
            self.model.base_model(**batch)
            states, self.capture.states = self.capture.states.to(self.backbone.model.dtype), None
            on_batch(len(states))
            yield states if self.backbone.reads_images else states[batch["attention_mask"].bool()]


class UpperLayers:
    """The layers from the first adapted one on, up to what the head reads. Names of modules stay what they were."""

    def __init__(self, backbone: FrozenBackbone, module_names: list[str]) -> None:
        path, first = split_point(backbone.model, module_names)
        self.is_causal_lm = backbone.is_causal_lm
        self.model = _shared_copy(backbone.model)
        setattr(self.model, backbone.head_name, nn.Identity())
        base = self.model.base_model
        # A language model takes embedded tokens past its embeddings; encoders hand them, or pixels, to this module.
        skipped = [*self.model.get_submodule(path)[:first]]
        skipped += [child for name, child in base.named_children() if name == "embeddings"]
        for module in skipped:
            module.forward = _pass_on

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the head reads, `(rows, feature_dim)`, of inputs as [`EncodedExamples`] makes them."""
        features = self.model(**inputs).logits
        if self.is_causal_lm:
            last = inputs["attention_mask"].sum(dim=1) - 1
            return features[torch.arange(len(last), device=last.device), last]
        return features


def _pass_on(*args, inputs_embeds=None, hidden_states=None, **kwargs) -> torch.Tensor:
    """The forward of a layer or an embedding that has done its work already."""
    return next(states for states in (inputs_embeds, hidden_states, *args) if states is not None)


def _shared_copy(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def modules_to_adapt(backbone: FrozenBackbone, targets: list[str] | None, layers: list[int] | None) -> list[str]:
    """The names of the linear modules of some layers, by default the upper third, that are called as in `targets`, by the
    end of their name as PEFT has it. A target with a dot, such as `pooler.dense`, is taken outside of the layers, too.
    Without targets they are all of the layers, and what is between these and the head.

    Raises:
        `ValueError`: when a layer is not there, or a target names no module; the message has the names that there are.
    """
    modules = [(name, module) for name, module in backbone.model.named_modules() if name != backbone.head_name]
    linear = {name: _LAYER.search(name) for name, module in modules if isinstance(module, nn.Linear)}
    count = 1 + max(int(layer[1]) for layer in linear.values() if layer)
    if layers is None:
        layers = list(range(count - -(-count // 3), count))
    if unknown := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"layers has {unknown}: the backbone has the layers 0 to {count - 1}.")
    if targets is None:
        return [name for name, layer in linear.items() if layer is None or int(layer[1]) in layers]
    found, used = [], set()
    for name, layer in linear.items():
        own = [one for one in targets if f".{name}".endswith(f".{one}") and (layer or "." in one)]
        if own and (layer is None or int(layer[1]) in layers):
            found.append(name)
            used.update(own)
    if missing := [one for one in targets if one not in used]:
        within = sorted({name[layer.end() :] for name, layer in linear.items() if layer})
        outside = [name for name, layer in linear.items() if layer is None]
        raise ValueError(
            f"target_modules {missing} name no linear module of the layers {layers}: expected ends of {within}, or of "
            f"{outside} with a dot, and layers that the backbone has."
        )
    return found


def split_point(model: nn.Module, module_names: list[str]) -> tuple[str, int]:
    """The list of layers that holds the named modules, and the lowest index among them. Modules behind the list, such
    as a pooler, may be named, too."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    places, outside = [], []
    for name in module_names:
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts))]
        stack = next((one for one in parents if isinstance(model.get_submodule(one), nn.ModuleList)), None)
        if stack is None:
            outside.append(name)
        else:
            places.append((stack, int(name.removeprefix(f"{stack}.").split(".")[0])))
    paths = {path for path, _ in places}
    if len(paths) != 1:
        raise ValueError(f"The LoRA targets must lie in one stack of layers; found {sorted(paths) or 'none'}.")
    (path,) = paths
    if before := [name for name in outside if order[name] < order[path]]:
        raise ValueError(
            f"The LoRA targets {before} stand before the layers {path!r}: expected layers, or what follows."
        )
    return path, min(first for _, first in places)
