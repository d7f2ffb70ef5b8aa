"""Training adapters as they are: that whose examples lie nearest to a task's, and the mean of all."""

from typing import Any

import torch
from fold import Fold
from splits import Split

from mcdi_hf import Task

from .base import Method


PLACED_BY = 2  # examples of a class that say where a training task lies


def nearest_coefficients(split: Split, fold: Fold, tasks: list[Task]) -> torch.Tensor:
    """For each task the training adapter of the most similar support, by the cosine of features under the shared one.

    Returns:
        Their coefficients, `(tasks, num_tokens, token_dim)`.
    """

    def places() -> torch.Tensor:
        training, shared = fold.training, fold.codec.shared_adapter()
        picks = [[row for rows in support for row in rows[:PLACED_BY].tolist()] for support in training.supports]
        seen = torch.tensor([row for pick in picks for row in pick])
        features = fold.stacked.features_of_all(shared, training.examples, seen)
        return torch.stack([own.mean(dim=0) for own in features.split([len(pick) for pick in picks])])

    training_places = fold.once("places", places)
    features = split.features("shared adapter", fold.codec.shared_adapter()).mean(dim=0)
    own = torch.stack([features[[row for rows in task.support for row in rows]].mean(dim=0) for task in tasks])
    nearest = torch.nn.functional.cosine_similarity(own[:, None], training_places[None], dim=-1).argmax(dim=1)
    return fold.training.coefficients[nearest]


class NearestAdapter(Method):
    """Retrieval in place of generation."""

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        return split.headed(fold.codec.matrices(nearest_coefficients(split, fold, tasks)), tasks)


class MeanAdapter(Method):
    """One adapter for all tasks, whose coefficients are the mean of those of the training adapters."""

    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        mean = fold.codec.matrices(fold.training.coefficients.mean(dim=0, keepdim=True))
        return split.free(split.features("mean adapter", mean), tasks, fold.codec.head)
