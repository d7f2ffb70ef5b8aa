"""A backbone cut below its first adapted layer: the lower part runs once an example, the upper one many times."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from .backbones import FrozenBackbone


@dataclass
class EncodedExamples:
    """Examples after the frozen lower layers, ready for any number of passes through the adapted upper ones.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(views * examples, length, hidden)`): Input of the first adapted layer.
        attention_mask (`torch.Tensor` of shape `(views * examples, length)`, *optional*): 1 for a token, 0 for padding
            behind the last one. Images have none.
        num_views (`int`, *optional*, defaults to 1): The examples as they are come first; the other views of the same
            examples, in the same order, are augmented ones.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None = None
    num_views: int = 1

    def __len__(self) -> int:
        """The number of examples, whatever the number of views."""
        return len(self.hidden_states) // self.num_views

    def __getitem__(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the upper layers for some rows, cut to the longest of them."""
        if self.attention_mask is None:
            return {"pixel_values": self.hidden_states[rows]}
        mask = self.attention_mask[rows]
        length = int(mask.sum(dim=1).max())
        return {"inputs_embeds": self.hidden_states[rows, :length], "attention_mask": mask[:, :length]}

    def lengths(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of tokens of some rows: `(rows,)`."""
        if self.attention_mask is None:
            return torch.full((len(rows),), self.hidden_states.shape[1])
        return self.attention_mask[rows].sum(dim=1).cpu()


class _Capture(nn.Module):
    """Keeps the states that reach a layer."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.states = hidden_states
        return hidden_states


class LowerLayers:
    """The frozen part of a backbone below its adapted layers.

    Args:
        backbone (`FrozenBackbone`): The backbone.
        module_names (`list[str]`): The adapted modules, all in one stack of layers.
    """

    def __init__(self, backbone: "FrozenBackbone", module_names: list[str]) -> None:
        path, first = split_point(backbone.model, module_names)
        self.backbone = backbone
        self.capture = _Capture()
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
    ) -> EncodedExamples:
        """Run the lower layers over examples, in batches of similar length.

        Args:
            examples (`list` of length `views * n`): Texts, pairs of texts or PIL images, see
                [`FrozenBackbone.tokens`]. With several views: all examples as they are, then other views of each.
            batch_size (`int`, *optional*, defaults to 64): Examples a pass.
            num_views (`int`, *optional*, defaults to 1): How many views of every example there are.
            on_batch (`Callable`, *optional*): Called after each pass with the number of its examples.

        Returns:
            [`EncodedExamples`] of `n` examples.
        """
        if not examples or len(examples) % num_views:
            raise ValueError(f"There are {len(examples)} examples of {num_views} views: expected a multiple of it.")
        if self.backbone.reads_images:
            batches = (examples[first : first + batch_size] for first in range(0, len(examples), batch_size))
            states = [self._states(self.backbone.inputs(batch), on_batch) for batch in batches]
            return EncodedExamples(torch.cat(states), num_views=num_views)
        tokens = self.backbone.tokens(examples)
        lengths = torch.tensor([len(ids) for ids in tokens["input_ids"]])
        hidden_states = mask = None
        for rows in lengths.argsort().split(batch_size):
            picked = {key: [values[row] for row in rows.tolist()] for key, values in tokens.items()}
            batch = self.backbone.pad(picked)
            states = self._states(batch, on_batch)
            if hidden_states is None:
                hidden_states = states.new_zeros(len(examples), int(lengths.max()), states.shape[-1])
                mask = batch["attention_mask"].new_zeros(len(examples), int(lengths.max()))
            hidden_states[rows, : states.shape[1]] = states
            mask[rows, : states.shape[1]] = batch["attention_mask"]
        return EncodedExamples(hidden_states, mask, num_views)

    def _states(self, batch: dict[str, torch.Tensor], on_batch: Callable[[int], None] | None) -> torch.Tensor:
        self.model.base_model(**batch)
        states, self.capture.states = self.capture.states, None
        if on_batch is not None:
            on_batch(len(states))
        return states


class UpperLayers:
    """The layers from the first adapted one on, up to what the head reads. Names of modules stay what they were.

    Args:
        backbone (`FrozenBackbone`): The backbone.
        module_names (`list[str]`): The adapted modules, all in one stack of layers.
    """

    def __init__(self, backbone: "FrozenBackbone", module_names: list[str]) -> None:
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
        """What the head reads: inputs of `rows` examples, as [`EncodedExamples`] makes them -> `(rows, feature_dim)`."""
        features = self.model(**inputs).logits
        if self.is_causal_lm:
            last = inputs["attention_mask"].sum(dim=1) - 1
            return features[torch.arange(len(last), device=last.device), last]
        return features


def _pass_on(hidden_states=None, *args, inputs_embeds=None, **kwargs) -> torch.Tensor:
    """The forward of a layer or an embedding that has done its work already."""
    return hidden_states if inputs_embeds is None else inputs_embeds


def _shared_copy(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def split_point(model: nn.Module, module_names: list[str]) -> tuple[str, int]:
    """The list of layers that holds the named modules, and the lowest index among them."""
    places = []
    for name in module_names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
                places.append((".".join(parts[:end]), int(parts[end])))
                break
    paths = {path for path, _ in places}
    if len(paths) != 1 or len(places) != len(module_names):
        raise ValueError(f"The LoRA targets must lie in one stack of layers; found {sorted(paths) or 'none'}.")
    return paths.pop(), min(first for _, first in places)
