"""One adapter that is trained on all training tasks."""

from typing import Any

import torch
from fold import Fold
from splits import Split

from mcdi_hf import Task, train_shared_adapter

from .base import Method


class SharedAdapter(Method):
    """Meta-trained on the training tasks with heads that need no training, as prototypical networks are.

    It has the steps, shots and learning rate of the shared start that the generator's training adapters have.
    """

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        def make() -> dict[str, torch.Tensor]:
            training, means = fold.training, fold.training.shared_start
            sampler, budget = (
                training.sampler(tuple(means["shots"]), 5, seed),
                (means["steps"], means["learning_rate"]),
            )
            tensors, scale = train_shared_adapter(fold.stacked, training.examples, sampler, *budget, seed=seed)
            return tensors | {"scale": torch.tensor(scale, dtype=torch.float64)}

        tensors = dict(fold.kept(f"shared-{seed}", make))
        scale = tensors.pop("scale").item()
        return split.free(split.features(f"shared {seed}", tensors), tasks, scale)
