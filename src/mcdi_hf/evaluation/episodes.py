"""Accuracy of adapters on the query examples of tasks."""

import torch

from ..adapters.stacked import StackedLora
from ..episodes import rows_and_labels
from ..layers import EncodedExamples
from ..tasks import Task


@torch.no_grad()
def query_accuracy(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], examples: EncodedExamples, task: Task
) -> float:
    """The share of a task's query examples that one adapter classifies rightly.

    Args:
        stacked (`StackedLora`): The backbone.
        tensors (`dict[str, torch.Tensor]`): Key -> tensor of one adapter with its head, without a stack dimension.
        examples (`EncodedExamples`): The data set that the task's rows point into.
        task (`Task`): The task.
    """
    rows, labels = rows_and_labels(task.query)
    own = {key: value.unsqueeze(0) for key, value in tensors.items()}
    logits = stacked.apply_head(own, stacked.features_of_all(own, examples, rows).unsqueeze(0))
    return (logits[0].argmax(dim=-1) == labels).float().mean().item()


def support_features(features: torch.Tensor, task: Task) -> dict[str, torch.Tensor]:
    """A task's support as ready features, from those of all rows `(rows, feature_dim)`."""
    return {name: features[list(rows)] for name, rows in zip(task.classes, task.support)}


def support_texts(texts: list[str], task: Task) -> dict[str, list[str]]:
    """A task's support as texts, from those of all rows."""
    return {name: [texts[row] for row in rows] for name, rows in zip(task.classes, task.support)}
