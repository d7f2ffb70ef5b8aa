"""Adapters that a generator makes: single draws and means, chosen or trained further, and of wrong conditions."""

import string
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fold import Fold
from PIL import Image
from splits import TASKS_AT_ONCE, Sizes, Split, Tensors

from mcdi_hf import MCDiPipeline, MCDiPipelineOutput, Task
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.validation import shuffled_labels
from mcdi_hf.trajectories.dataset import load_task_encoder

from .base import Method, SlowMethod


NOISE_INPUTS = 64


@dataclass(frozen=True)
class Generated(Method):
    """The mean of some draws.

    Attributes:
        objective (`str`, *optional*, defaults to `"Mc-Di"`): What the generator was trained with, see `OBJECTIVES`.
        candidates (`int`, *optional*, defaults to 8): Draws.
    """

    group = "generated"
    objective: str = "Mc-Di"
    candidates: int = 8

    def fits(self, fold: Fold, seed: int) -> bool:
        return (self.objective, seed) in fold.generator.pipelines

    def episodes(self, sizes: Sizes, task: Task) -> int:
        control = self.group == "controls" or self.objective != "Mc-Di"
        return min(sizes.episodes, sizes.control_episodes) if control else sizes.episodes

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        pipe, noise = fold.pipeline(self.objective, seed), torch.Generator().manual_seed(seed)
        support, found = split.support(tasks), []
        seen = self.seen(split, fold, tasks, support)  # all tasks have the same noise, whatever is seen
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = slice(first, first + TASKS_AT_ONCE)
            found += split.whole(self.adapters(pipe, seen[part], support[part], noise), tasks[part])
        return found

    def seen(self, split: Split, fold: Fold, tasks: list[Task], support: SupportBatch) -> SupportBatch:
        """What the generator is shown of the tasks."""
        return support

    def adapters(
        self, pipe: MCDiPipeline, seen: SupportBatch, support: SupportBatch, noise: torch.Generator
    ) -> Tensors:
        """An adapter for each task, with a head of its own support: key -> `(tasks, *shape)`."""
        tokens = pipe(seen, num_candidates=self.candidates, generator=noise, output_type="latent").adapters
        return pipe.decode_adapters(tokens, support)


class Proposed(Method):
    """A hypernetwork of equal means: what the task encoder proposes, as it was trained with the shared start, before any
    diffusion."""

    group = "generated"
    needs_training = True

    @torch.no_grad()
    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        encoder = fold.once("task encoder", lambda: load_task_encoder(str(fold.generator.trajectories)))
        shared, head, found = fold.codec.shared_adapter(), fold.codec.head, []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            seen = see_support(fold.stacked, shared, head, split.support(part))
            made = encoder(seen.features, seen.gradients, seen.labels, seen.class_mask).proposal
            found += split.headed(fold.codec.matrices(1 + made), part)
        return found


class Selected(SlowMethod, Generated):
    """One of the draws, their mean or what is free, by cross-validation on the support."""

    def adapters(
        self, pipe: MCDiPipeline, seen: SupportBatch, support: SupportBatch, noise: torch.Generator
    ) -> Tensors:
        output = self.go_on(pipe, pipe(seen, num_candidates=self.candidates, generator=noise))
        return pipe.codec.layout.stack([one.tensors for one in output.adapters], support.class_mask.shape[1])

    def go_on(self, pipe: MCDiPipeline, output: MCDiPipelineOutput) -> MCDiPipelineOutput:
        """What is made of the draws."""
        return pipe.select(output)


class Refined(Selected):
    """The mean of the draws, trained a few steps further on the support."""

    def go_on(self, pipe: MCDiPipeline, output: MCDiPipelineOutput) -> MCDiPipelineOutput:
        return pipe.refine(output)


class OtherTask(Generated):
    """A control: the generator sees the support of the next task."""

    group = "controls"

    def seen(self, split: Split, fold: Fold, tasks: list[Task], support: SupportBatch) -> SupportBatch:
        return split.support([*tasks[1:], tasks[0]])


class OtherAttribute(Generated):
    """A control: the generator sees the support of a task of the experiment's `control_kind`, which is of something
    else."""

    group = "controls"

    def fits(self, fold: Fold, seed: int) -> bool:
        return "control_kind" in fold.config and super().fits(fold, seed)

    def seen(self, split: Split, fold: Fold, tasks: list[Task], support: SupportBatch) -> SupportBatch:
        return split.support(split.tasks(fold.config["control_kind"], 0, len(tasks)))


class ShuffledLabels(Generated):
    """A control: the generator sees the examples with their labels shuffled, as many of each class as before."""

    group = "controls"

    def seen(self, split: Split, fold: Fold, tasks: list[Task], support: SupportBatch) -> SupportBatch:
        return shuffled_labels(support, seed=0)


class NoiseCondition(Generated):
    """A control: the generator sees inputs that say nothing."""

    group = "controls"

    def seen(self, split: Split, fold: Fold, tasks: list[Task], support: SupportBatch) -> SupportBatch:
        inputs = random_inputs(split.inputs([0])[0], NOISE_INPUTS)
        examples = fold.once("noise", lambda: fold.stacked.encode(inputs))
        rows = np.random.default_rng(0).integers(NOISE_INPUTS, size=tuple(support.labels.shape))
        return replace(support, rows=torch.from_numpy(rows), examples=examples)


def random_inputs(like: Any, count: int) -> list:
    """Letters drawn at random for a text or a pair of texts, pixels drawn at random for an image."""
    random = np.random.default_rng(0)
    if isinstance(like, Image.Image):
        shape = np.asarray(like).shape
        return [Image.fromarray(random.integers(256, size=shape, dtype=np.uint8)) for _ in range(count)]
    letters = np.array(list(string.ascii_lowercase + "    "))
    return ["".join(random.choice(letters, size=60)) for _ in range(count)]
