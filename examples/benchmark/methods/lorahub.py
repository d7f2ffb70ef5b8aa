"""LoraHub: a mix of training adapters, its coefficients found without gradients on the task's shots."""

from typing import Any

import nevergrad
import numpy as np
import torch
from fold import Fold
from splits import TASKS_AT_ONCE, Split, Tensors

from mcdi_hf import Task
from mcdi_hf.adapters.head import class_means, head_logits
from mcdi_hf.data.episodes import SupportBatch, task_losses

from .base import SlowMethod


NUM_ADAPTERS = 20  # that a task mixes, as in the paper
BOUND = 1.5  # coefficients lie between minus this and this
PENALTY = 0.05  # times the mean absolute coefficient, on top of the support loss


class LoraHub(SlowMethod):
    """Mixes training adapters for each task (Huang et al. 2023, arXiv 2307.13269).

    A task draws some training adapters and mixes them by coefficients `w` into `lora_A = sum_i w_i A_i` and
    `lora_B = sum_i w_i B_i`. The coefficients start at zero, where the mix is the frozen backbone, and a gradient-free
    optimiser, nevergrad's NGOpt as in the paper, looks for the least [`support_losses`] plus a penalty; the best that
    it tried are taken. Two things are not the paper's: heads, whose classes differ from task to task, are imprinted
    under each mix, and the loss of an example is taken without it.
    """

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        adapters, scale, found = fold.training.adapters, fold.frozen_scale, []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            seeds = [(seed, first + index) for index in range(len(part))]
            support, count = split.support(part), fold.sizes.lorahub_evaluations
            found += split.imprinted(mixed_adapters(fold.stacked, adapters, support, scale, count, seeds), part, scale)
        return found


@torch.no_grad()
def mixed_adapters(
    stacked, adapters: Tensors, support: SupportBatch, scale: float, num_evaluations: int, seeds: list[tuple[int, int]]
) -> Tensors:
    """Search the best mix for each task; each try is one pass for all of them.

    Args:
        stacked (`StackedLora`): The backbone.
        adapters (`dict[str, torch.Tensor]`): Training adapters' LoRA matrices, key -> `(training adapters, *shape)`.
        support (`SupportBatch`): The tasks, with examples.
        scale (`float`): The sharpness of imprinted heads.
        num_evaluations (`int`): Coefficients that are tried for a task.
        seeds (`list`): One a task, so that its draws do not depend on its neighbours.

    Returns:
        Key -> `(tasks, *shape)`.
    """
    count = len(next(iter(adapters.values())))
    mixed, randoms = min(NUM_ADAPTERS, count), [np.random.default_rng(one) for one in seeds]
    drawn = torch.tensor(np.stack([random.choice(count, mixed, replace=False) for random in randoms]))
    own = {key: value[drawn].to(stacked.device) for key, value in adapters.items()}
    searches = [_search(mixed, num_evaluations, random) for random in randoms]
    best = torch.full((len(seeds),), float("inf"), device=stacked.device)
    chosen = torch.zeros(drawn.shape, device=stacked.device)
    verbalizers = stacked.free_heads(support) if stacked.backbone.is_causal_lm else None
    for _ in range(num_evaluations):
        asked = [search.ask() for search in searches]
        tried = torch.tensor(np.stack([one.value for one in asked])).to(chosen)
        features = stacked.features(mix(own, tried), support.inputs())
        losses = support_losses(features, support.labels, support.class_mask, scale, verbalizers)
        objective = losses + PENALTY * tried.abs().mean(dim=1)
        for search, one, value in zip(searches, asked, objective.tolist()):
            search.tell(one, value)
        chosen = torch.where((objective < best).unsqueeze(1), tried, chosen)
        best = objective.minimum(best)
    return mix(own, chosen)


def mix(adapters: Tensors, weights: torch.Tensor) -> Tensors:
    """Sum each task's adapters, key -> `(tasks, adapters, *shape)`, by weights `(tasks, adapters)`."""
    return {key: torch.einsum("ti,ti...->t...", weights, value) for key, value in adapters.items()}


def support_losses(
    features: torch.Tensor,
    labels: torch.Tensor,
    class_mask: torch.Tensor,
    scale: float,
    verbalizers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The mean cross-entropy of each task's support under a head imprinted from the rest of it: `(tasks,)`.

    An example is left out of its own class's mean, or nearly every mix would be right. Of a class of one example no
    mean is left without it: that example is judged under the head that is imprinted from it, and what the loss can
    still tell is how far the classes lie apart. Verbalizers need no support: nothing is left out.

    Args:
        features (`torch.Tensor` of shape `(tasks, examples, feature_dim)`): What the head reads of the support.
        labels (`torch.Tensor` of shape `(tasks, examples)`): Its classes; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
        scale (`float`): The sharpness of the head.
        verbalizers (`tuple` of `(tasks, classes, feature_dim)` and `(tasks, classes)`, *optional*): Heads.
    """
    if verbalizers is not None:
        return task_losses(head_logits(features, *verbalizers, class_mask), labels)
    means = class_means(features, labels, class_mask.shape[1])
    # by differences: by products, as large stacks would be, a small distance is lost in the rounding
    distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = labels.unsqueeze(-1) == torch.arange(class_mask.shape[1], device=labels.device)
    shots = own.sum(dim=1, keepdim=True)
    # Without the example the mean of n moves away from it: the distance grows by n / (n - 1).
    farther = torch.where(shots > 1, shots / (shots - 1).clamp(min=1), 1.0).square()
    logits = -scale / 2 * torch.where(own, farther * distances, distances)
    return task_losses(logits.masked_fill(~class_mask.unsqueeze(1), float("-inf")), labels)


def _search(num_adapters: int, num_evaluations: int, random: np.random.Generator):
    """One task's optimiser, which starts from zero."""
    space = nevergrad.p.Array(init=np.zeros(num_adapters), lower=-BOUND, upper=BOUND)
    space.random_state.seed(int(random.integers(2**31)))
    return nevergrad.optimizers.NGOpt(space, budget=num_evaluations)
