"""LoraHub: a mix of training adapters, its coefficients found without gradients on the task's shots."""

from typing import Any

import nevergrad
import numpy as np
import torch
from fold import Fold
from splits import TASKS_AT_ONCE, Split

from mcdi_hf import Task
from mcdi_hf.adapters.head import head_logits
from mcdi_hf.data.episodes import SupportBatch, task_losses

from .base import SlowMethod


NUM_ADAPTERS = 20  # that a task mixes, as in the paper
BOUND = 1.5  # coefficients lie between minus this and this
PENALTY = 0.05  # times the mean absolute coefficient, on top of the support loss


class LoraHub(SlowMethod):
    """Mixes training adapters for each task (Huang et al. 2023, arXiv 2307.13269).

    A task draws some training adapters and mixes their coefficients z by weights `w` into `sum_i w_i z_i`: all are written
    in one basis. The weights start at zero, where the mix is the frozen backbone, and a gradient-free optimiser,
    nevergrad's NGOpt as in the paper, looks for the least loss of the support, each example under the head of the
    others, plus a penalty; the best that it tried are taken. Heads, whose classes differ from task to task, are not the
    paper's.
    """

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        found = []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            seeds = [(seed, first + index) for index in range(len(part))]
            support, count = split.support(part), fold.sizes.lorahub_evaluations
            mixed = mixed_coefficients(fold, support, count, seeds)
            found += split.headed(fold.codec.matrices(mixed), part)
        return found


@torch.no_grad()
def mixed_coefficients(
    fold: Fold, support: SupportBatch, num_evaluations: int, seeds: list[tuple[int, int]]
) -> torch.Tensor:
    """Search the best mix for each task; each try is one pass for all of them.

    Args:
        fold (`Fold`): The backbone, the codec, and the training adapters' coefficients.
        support (`SupportBatch`): The tasks, with examples.
        num_evaluations (`int`): Weights that are tried for a task.
        seeds (`list`): One a task, so that its draws do not depend on its neighbours.

    Returns:
        `torch.Tensor` of shape `(tasks, num_tokens, token_dim)`.
    """
    known, device = fold.training.coefficients, fold.stacked.device
    mixed, randoms = min(NUM_ADAPTERS, len(known)), [np.random.default_rng(one) for one in seeds]
    own = known[torch.tensor(np.stack([random.choice(len(known), mixed, replace=False) for random in randoms]))]
    searches = [_search(mixed, num_evaluations, random) for random in randoms]
    best = torch.full((len(seeds),), float("inf"), device=device)
    chosen = torch.zeros(len(seeds), mixed, device=device)
    for _ in range(num_evaluations):
        asked = [search.ask() for search in searches]
        tried = torch.tensor(np.stack([one.value for one in asked])).to(chosen)
        objective = support_losses(fold, mix(own, tried), support) + PENALTY * tried.abs().mean(dim=1)
        for search, one, value in zip(searches, asked, objective.tolist()):
            search.tell(one, value)
        chosen = torch.where((objective < best).unsqueeze(1), tried, chosen)
        best = objective.minimum(best)
    return mix(own, chosen)


def mix(coefficients: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum each task's adapters `(tasks, adapters, num_tokens, token_dim)` by weights `(tasks, adapters)`."""
    return torch.einsum("ti,tinr->tnr", weights, coefficients)


def support_losses(fold: Fold, coefficients: torch.Tensor, support: SupportBatch) -> torch.Tensor:
    """The mean cross-entropy of each task's support, every example under the head of the others: `(tasks,)`."""
    features = fold.stacked.features(fold.codec.matrices(coefficients), support.inputs())
    if fold.stacked.backbone.is_causal_lm:  # verbalizers need no support: nothing is left out
        logits = head_logits(features, *fold.stacked.verbalizers(support), support.class_mask)
    else:
        logits = fold.codec.head.left_out_logits(features, support.labels, support.class_mask)
    return task_losses(logits, support.labels)


def _search(num_adapters: int, num_evaluations: int, random: np.random.Generator):
    """One task's optimiser, which starts from zero."""
    space = nevergrad.p.Array(init=np.zeros(num_adapters), lower=-BOUND, upper=BOUND)
    space.random_state.seed(int(random.integers(2**31)))
    return nevergrad.optimizers.NGOpt(space, budget=num_evaluations)
