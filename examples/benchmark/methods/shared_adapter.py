"""One adapter that is trained on all training tasks."""

from typing import Any

import torch
from fold import Fold
from splits import Split

from mcdi_hf import Task, train_shared_adapter

from .base import Method


class SharedAdapter(Method):
    """Meta-trained on the training tasks with heads that need no training, as prototypical networks are."""

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        steps = fold.sizes.shared_steps

        def train() -> dict[str, torch.Tensor]:
            sampler = fold.training.sampler((1, 5), 5, seed)
            tensors, scale = train_shared_adapter(fold.stacked, fold.training.examples, sampler, steps, seed=seed)
            return tensors | {"scale": torch.tensor(scale, dtype=torch.float64)}

        tensors = dict(fold.kept(f"shared-{steps}-{seed}", train))
        scale = tensors.pop("scale").item()
        return split.free(split.features(f"shared {seed}", tensors), tasks, scale)
