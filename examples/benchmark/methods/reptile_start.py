"""REPTILE on the adapter itself: a start from which a few gradient steps on a task's shots go far."""

import torch
from fold import Fold
from splits import TASKS_AT_ONCE, Split, Tensors

from mcdi_hf import Task, TrajectorySettings, collect_trajectories
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter

from .base import SlowMethod


TASKS_PER_STEP, INNER_STEPS, BATCH_SIZE = 4, 5, 20


class AdapterReptile(SlowMethod):
    """REPTILE (Nichol et al. 2018) on the training tasks, then Adam on the shots; validation chooses how many steps.

    Heads are imprinted under the start, or verbalizers, while it is learnt and for test tasks.
    """

    needs_training = True

    def settings(self, split: Split, fold: Fold, shots: int) -> list[int]:
        return [1, 3, 10, 30]

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: int) -> list[float]:
        start = fold.kept(f"reptile-{fold.sizes.reptile_steps}-{seed}", lambda: reptile_start(fold, seed))
        features, found = split.features(f"reptile {seed}", start).mean(dim=0), []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            rows = adapted(fold, split.examples, start, features, part, setting, seed)
            found += [row["accuracy"] for row in rows]
        return found


def reptile_start(fold: Fold, seed: int) -> Tensors:
    """The start: four tasks a step, five steps of Adam on the support of each, and towards their mean end.

    Each step is shorter than the last.

    Returns:
        Key -> `(1, *shape)`.
    """
    stacked, examples = fold.stacked, fold.training.examples
    sampler, steps = fold.training.sampler((5, 5), 1, seed), fold.sizes.reptile_steps
    start = initial_adapter(stacked.layout, seed)
    for step in range(steps):
        tasks = [sampler[TASKS_PER_STEP * step + number] for number in range(TASKS_PER_STEP)]
        used = sorted({row for task in tasks for rows in task.support for row in rows})
        features = torch.zeros(len(examples), stacked.layout.feature_dim, device=stacked.device)
        features[used] = stacked.features_of_all(start, examples, torch.tensor(used))
        ends = [
            split_weights(torch.from_numpy(row["weights"][-1:]), len(row["classes"]), stacked.layout)
            for row in adapted(fold, examples, start, features, tasks, INNER_STEPS, seed)
        ]
        for key, value in start.items():
            mean = torch.cat([end[key] for end in ends]).mean(dim=0, keepdim=True)
            start[key] = value + (1 - step / steps) * (mean - value)
    return start


def adapted(
    fold: Fold,
    examples: EncodedExamples,
    start: Tensors,
    features: torch.Tensor,
    tasks: list[Task],
    steps: int,
    seed: int,
) -> list[dict]:
    """Some steps of Adam on the support of each task, from a start under which `features` are seen."""
    settings = TrajectorySettings(
        num_steps=steps, num_targets=1, batch_size=BATCH_SIZE, imprint_scale=fold.frozen_scale, seed=seed
    )
    return collect_trajectories(fold.stacked, examples, start, features, tasks, list(range(len(tasks))), settings)
