"""What the pipeline returns."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..adapters.codec import AdapterCodec
from ..adapters.generated import GeneratedAdapter, GenerationDetails
from ..data.episodes import SupportBatch
from .support import KINDS, SupportSet, kind_of


@dataclass
class Draws:
    """How some tasks' adapters were drawn: what `select` and `refine` go on from.

    The arguments of the call are `settings`; `generators` are every task's stream of noise before the first draw,
    and `latents` the starting noise, if it was given. For each part of the tasks that the call worked on there are,
    for `output_type="peft"`, the encoded support sets in `batches`, and the tokens `(tasks, candidates, tokens,
    token_dim)` in `candidates`.
    """

    settings: dict[str, Any]
    generators: list[torch.Generator]
    latents: torch.Tensor | None
    batches: list[SupportBatch] = field(default_factory=list)
    candidates: list[torch.Tensor] = field(default_factory=list)

    def again(self, tasks: torch.Tensor) -> dict[str, Any]:
        """The arguments that draw for some tasks from the same noise again."""
        tasks, latents = tasks.cpu(), self.latents
        if latents is not None:
            latents = latents.unflatten(0, (-1, self.settings["num_candidates"]))[tasks].flatten(0, 1)
        generators = [self.generators[task].clone_state() for task in tasks.tolist()]
        return {**self.settings, "generator": generators, "latents": latents}


@dataclass
class MCDiPipelineOutput(BaseOutput):
    """
    Args:
        adapters (`list[GeneratedAdapter]` or `torch.Tensor`): One a task, the mean of its candidates; a tensor of
            shape `(tasks, numbers)` for `output_type="pt"` and of shape `(tasks, tokens, token_dim)` for `"latent"`.
        draws ([`Draws`]): How they were drawn, for [`MCDiPipeline.select`] and [`MCDiPipeline.refine`].

    Example: `pipe(support).adapters[0].save_pretrained("my-adapter")`
    """

    adapters: list[GeneratedAdapter] | torch.Tensor
    draws: Draws


def described_adapters(
    tensors: dict[str, torch.Tensor],
    batch: SupportBatch,
    supports: list[SupportSet] | SupportBatch,
    codec: AdapterCodec,
    details: GenerationDetails,
    seeds: list[int | None],
) -> list[GeneratedAdapter]:
    """The adapters of a stack, key on disk -> `(tasks, *shape)`, each with how it was made, and with its texts if
    its support set is of texts. `details` are what all of them have in common."""
    has_texts = not isinstance(supports, SupportBatch) and kind_of(supports) in KINDS[:2]
    adapters = []
    for task, own in enumerate(codec.layout.unstack(tensors, [len(classes) for classes in batch.classes])):
        labels = batch.labels[task]
        shots = torch.bincount(labels[labels >= 0]).tolist()
        adapters.append(
            GeneratedAdapter(
                tensors=own,
                lora_config=codec.config.lora_config,
                base_model=codec.config.base_model,
                labels=list(batch.classes[task]),
                details=replace(details, shots=shots, seed=seeds[task]),
                support=supports[task] if has_texts else None,
            )
        )
    return adapters
