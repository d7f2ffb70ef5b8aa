"""The rival LoraHub: a mix of training adapters, its coefficients found without gradients on the same shots."""

import nevergrad
import numpy as np
import torch

from mcdi_hf import StackedLora, Task
from mcdi_hf.adapters.head import class_means, head_logits
from mcdi_hf.data.episodes import Episodes
from mcdi_hf.backbones.layers import EncodedExamples


BOUND = 1.5  # coefficients lie between minus this and this
PENALTY = 0.05  # times the mean absolute coefficient, on top of the support loss


@torch.no_grad()
def mixed_adapters(
    stacked: StackedLora,
    adapters: dict[str, torch.Tensor],
    examples: EncodedExamples,
    tasks: list[Task],
    scale: float,
    num_adapters: int = 20,
    num_evaluations: int = 40,
    seed: int = 0,
    tasks_at_once: int = 16,
) -> dict[str, torch.Tensor]:
    """Mix training adapters for each task as LoraHub does (Huang et al. 2023, arXiv 2307.13269).

    A task draws some training adapters and mixes them by coefficients `w` into `lora_A = sum_i w_i A_i` and
    `lora_B = sum_i w_i B_i`. The coefficients start at zero, where the mix is the frozen backbone, and a gradient-free
    optimiser, nevergrad's NGOpt as in the paper, looks for the least [`support_losses`] plus 0.05 times their mean
    absolute value; the best that it tried are taken. Two things are not the paper's: heads, whose classes differ from
    task to task, are imprinted under each mix, and the loss of an example is taken without it.

    Args:
        stacked (`StackedLora`): The backbone.
        adapters (`dict[str, torch.Tensor]`): The training adapters, key -> `(training adapters, *shape)`, LoRA matrices.
        examples (`EncodedExamples`): The data set that the tasks' rows point into.
        tasks (`list[Task]`): The tasks; only their support is looked at.
        scale (`float`): The sharpness of imprinted heads, see [`imprint_head`].
        num_adapters (`int`, *optional*, defaults to 20): Training adapters that a task draws.
        num_evaluations (`int`, *optional*, defaults to 40): Coefficients that are tried for a task.
        seed (`int`, *optional*, defaults to 0): A task's draws depend on it and the task's place in the list only.
        tasks_at_once (`int`, *optional*, defaults to 16): Tasks of a stack: each try is one pass for all of them.

    Returns:
        Key -> `(tasks, *shape)`.
    """
    count = len(next(iter(adapters.values())))
    if not 1 <= num_adapters <= count:
        raise ValueError(f"num_adapters is {num_adapters}: expected 1 to {count}, the number of training adapters.")
    parts = []
    for first in range(0, len(tasks), tasks_at_once):
        part = tasks[first : first + tasks_at_once]
        randoms = [np.random.default_rng((seed, first + index)) for index in range(len(part))]
        drawn = torch.tensor(np.stack([random.choice(count, num_adapters, replace=False) for random in randoms]))
        own = {key: value[drawn].to(stacked.device) for key, value in adapters.items()}
        searches = [_search(num_adapters, num_evaluations, random) for random in randoms]
        episodes = Episodes.of(part, stacked.device)
        support, words = examples[episodes.support.flatten()], stacked.word_heads([task.classes for task in part])
        best = torch.full((len(part),), float("inf"), device=stacked.device)
        chosen = torch.zeros(drawn.shape, device=stacked.device)
        for _ in range(num_evaluations):
            asked = [search.ask() for search in searches]
            tried = torch.tensor(np.stack([one.value for one in asked])).to(chosen)
            features = stacked.features(mix(own, tried), support)
            losses = support_losses(features, episodes.labels, episodes.class_mask, scale, words)
            objective = losses + PENALTY * tried.abs().mean(dim=1)
            for search, one, value in zip(searches, asked, objective.tolist()):
                search.tell(one, value)
            chosen = torch.where((objective < best).unsqueeze(1), tried, chosen)
            best = objective.minimum(best)
        parts.append(mix(own, chosen))
    return {key: torch.cat([part[key] for part in parts]) for key in adapters}


def mix(adapters: dict[str, torch.Tensor], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum each task's adapters, key -> `(tasks, adapters, *shape)`, by weights `(tasks, adapters)`."""
    return {key: torch.einsum("ti,ti...->t...", weights, value) for key, value in adapters.items()}


def support_losses(
    features: torch.Tensor,
    labels: torch.Tensor,
    class_mask: torch.Tensor,
    scale: float,
    words: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The mean cross-entropy of each task's support under a head imprinted from the rest of it.

    An example is left out of its own class's mean, or nearly every mix would be right. Of a class of one example no
    mean is left without it: that example is judged under the head that is imprinted from it, and what the loss can
    still tell is how far the classes lie apart. Words need no support: nothing is left out.

    Args:
        features (`torch.Tensor` of shape `(tasks, examples, feature_dim)`): What the head reads of the support.
        labels (`torch.Tensor` of shape `(tasks, examples)`): Its classes; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
        scale (`float`): See [`imprint_head`].
        words (`tuple` of `(tasks, classes, feature_dim)` and `(tasks, classes)`, *optional*): A language model's heads.

    Returns:
        `torch.Tensor` of shape `(tasks,)`.
    """
    if words is None:
        means = class_means(features, labels, class_mask.shape[1])
        # by differences: by products, as large stacks would be, a small distance is lost in the rounding
        distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        own = labels.unsqueeze(-1) == torch.arange(class_mask.shape[1], device=labels.device)
        shots = own.sum(dim=1, keepdim=True)
        # Without the example the mean of n moves away from it: the distance grows by n / (n - 1).
        farther = torch.where(shots > 1, shots / (shots - 1).clamp(min=1), 1.0).square()
        logits = -scale / 2 * torch.where(own, farther * distances, distances)
        logits = logits.masked_fill(~class_mask.unsqueeze(1), float("-inf"))
    else:
        logits = head_logits(features, *words, class_mask)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="none")
    return losses.sum(dim=1) / (labels >= 0).sum(dim=1)


def _search(
    num_adapters: int, num_evaluations: int, random: np.random.Generator
) -> nevergrad.optimizers.base.Optimizer:
    """One task's optimiser, which starts from zero."""
    space = nevergrad.p.Array(init=np.zeros(num_adapters), lower=-BOUND, upper=BOUND)
    space.random_state.seed(int(random.integers(2**31)))
    return nevergrad.optimizers.NGOpt(space, budget=num_evaluations)
