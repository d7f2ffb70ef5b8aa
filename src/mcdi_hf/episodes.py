"""Tasks as tensors: many support and query sets, padded to one shape."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .tasks import Task


@dataclass
class Episodes:
    """Tasks of any numbers of classes and examples.

    Attributes:
        support (`torch.Tensor` of shape `(tasks, examples)`): Rows to learn from.
        labels (`torch.Tensor` of shape `(tasks, examples)`): Their classes; -1 marks padding.
        query (`torch.Tensor` of shape `(tasks, queries)`): Rows to be judged on.
        query_labels (`torch.Tensor` of shape `(tasks, queries)`): Their classes; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
    """

    support: torch.Tensor
    labels: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor
    class_mask: torch.Tensor

    @classmethod
    def of(cls, tasks: list[Task], device: torch.device | str = "cpu") -> "Episodes":
        """Bring some tasks to one shape.

        Args:
            tasks (`list[Task]`): The tasks.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where labels and mask shall be; rows stay
                on the CPU, beside the data.
        """
        support, labels = zip(*(rows_and_labels(task.support) for task in tasks))
        query, query_labels = zip(*(rows_and_labels(task.query) for task in tasks))
        ways = torch.tensor([len(task.classes) for task in tasks])
        return cls(
            pad_sequence(support, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=-1).to(device),
            pad_sequence(query, batch_first=True),
            pad_sequence(query_labels, batch_first=True, padding_value=-1).to(device),
            (torch.arange(int(ways.max())) < ways.unsqueeze(-1)).to(device),
        )

    def accuracies(self, logits: torch.Tensor) -> list[float]:
        """The share of each task's queries that logits `(tasks, queries, classes)` classify rightly."""
        right = (logits.argmax(dim=-1) == self.query_labels).sum(dim=1)
        return (right / (self.query_labels >= 0).sum(dim=1)).tolist()


def rows_and_labels(examples: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten rows by class to `(n,)` rows and `(n,)` labels."""
    rows = torch.tensor([row for members in examples for row in members])
    labels = torch.tensor([label for label, members in enumerate(examples) for _ in members])
    return rows, labels
