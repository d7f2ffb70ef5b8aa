"""One adapter for all tasks: that which a generator starts from, and one that was trained for nothing else."""

from dataclasses import asdict
from typing import Any

import torch
from fold import Fold
from splits import Split, Tensors

from mcdi_hf import Task, train_shared_adapter
from mcdi_hf.adapters.head import RidgeHead
from mcdi_hf.trajectories.shared import SharedStart

from .base import Method


class SharedAdapter(Method):
    """What the generator starts from, at strength 0."""

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        features = split.features("shared adapter", fold.codec.shared_adapter())
        return split.free(features, tasks, fold.codec.head)


def equal_shared(fold: Fold) -> tuple[Tensors, RidgeHead]:
    """An adapter, key -> `(1, *shape)`, that is trained on the training tasks as the generator's shared start was, with the
    same tasks, steps, matrices, rank and head, but without any coefficients: all of it is for one adapter."""

    def make() -> Tensors:
        training, means = fold.training, fold.training.shared_start
        budget = means["steps"], means["tasks_per_step"], means["learning_rate"]
        rest = {"own_share": 0.0, "proposed_share": 0.0, "mixed_precision": fold.mixed_precision}
        start = SharedStart(fold.stacked, training.examples, training.sampler, [], *budget, **rest)
        tensors, head, _ = train_shared_adapter(start)
        return tensors | {name: torch.tensor(value, dtype=torch.float64) for name, value in asdict(head).items()}

    tensors = dict(fold.kept("equal_shared", make))
    return tensors, RidgeHead(**{name: tensors.pop(name).item() for name in asdict(RidgeHead())})


class EqualShared(Method):
    """See [`equal_shared`]."""

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        tensors, head = equal_shared(fold)
        return split.free(split.features("equal shared", tensors), tasks, head)
