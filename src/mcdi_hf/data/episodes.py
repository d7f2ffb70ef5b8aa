"""Labelled examples of many tasks as tensors of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from .encoded import EncodedExamples
from .tasks import Task


@dataclass
class SupportBatch:
    """The labelled examples of some tasks, padded to one shape: their support sets, or their queries.

    Attributes:
        labels (`torch.Tensor` of shape `(tasks, examples)`): Classes from 0; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
        rows (`torch.Tensor` of shape `(tasks, views * examples)`, *optional*): The examples' rows in a table, on the
            CPU; 0 for padding. With several views: all of the first view, then all of the second, and so on.
        features (`torch.Tensor` of shape `(tasks, examples, feature_dim)`, *optional*): What a generator sees of them,
            see [`see_support`].
        gradients (`torch.Tensor` of shape `(tasks, num_tokens, token_dim)`, *optional*): Those of the support's loss
            with respect to the coefficients of an adapter's tokens, see [`see_support`].
        examples ([`EncodedExamples`], *optional*): The table that `rows` point into.
        classes (`list[tuple[str, ...]]`, *optional*): The class names of every task.
    """

    labels: torch.Tensor
    class_mask: torch.Tensor
    rows: torch.Tensor | None = None
    features: torch.Tensor | None = None
    gradients: torch.Tensor | None = None
    examples: EncodedExamples | None = None
    classes: list[tuple[str, ...]] | None = None

    @classmethod
    def from_rows(
        cls,
        rows: list[Sequence[Sequence[int]]],
        classes: list[tuple[str, ...]] | None = None,
        ways: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "SupportBatch":
        """Bring the rows of some tasks to one shape.

        Args:
            rows (`list`): For each task and each of its classes, the rows of its examples.
            classes (`list[tuple[str, ...]]`, *optional*): The class names of every task.
            ways (`int`, *optional*): How many classes to pad to; by default the most that a task has.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where labels and mask shall be.
        """
        flat, labels = zip(*map(rows_and_labels, rows))
        counts = torch.tensor([len(one) for one in rows])
        class_mask = torch.arange(max(int(counts.max()), ways or 0)) < counts.unsqueeze(-1)
        labels = pad_sequence(labels, batch_first=True, padding_value=-1)
        return cls(labels.to(device), class_mask.to(device), pad_sequence(flat, batch_first=True), classes=classes)

    @classmethod
    def from_tasks(
        cls, tasks: list[Task], part: str = "support", device: torch.device | str = "cpu"
    ) -> "SupportBatch":
        """The `"support"` or the `"query"` of some tasks."""
        return cls.from_rows([getattr(task, part) for task in tasks], [task.classes for task in tasks], device=device)

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.labels)

    def __getitem__(self, tasks: slice | torch.Tensor) -> "SupportBatch":
        """Some of the tasks, in the order given, as often as they are given."""
        order = torch.arange(len(self))[tasks if isinstance(tasks, slice) else torch.as_tensor(tasks).cpu()].reshape(
            -1
        )
        picked = {name: value[order] for name, value in self._tensors().items()}
        if self.classes is not None:
            picked["classes"] = [self.classes[task] for task in order.tolist()]
        return replace(self, **picked)

    @property
    def plain_rows(self) -> torch.Tensor:
        """The rows of the examples as they are, without their other views: `(tasks, examples)`."""
        return self.rows[:, : self.labels.shape[1]]

    def inputs(self, views: bool = False) -> dict[str, torch.Tensor]:
        """The upper layers' inputs of the examples of all tasks, with their other `views` or without."""
        return self.examples[(self.rows if views else self.plain_rows).flatten()]

    def to(self, device: torch.device | str) -> "SupportBatch":
        """The batch with all but its rows on another device."""
        moved = {name: value.to(device) for name, value in self._tensors().items() if name != "rows"}
        examples = self.examples and replace(self.examples, device=torch.device(device))
        return replace(self, examples=examples, **moved)

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def rows_and_labels(examples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten rows by class to `(n,)` rows and `(n,)` labels."""
    rows = torch.tensor([row for members in examples for row in members])
    labels = torch.tensor([label for label, members in enumerate(examples) for _ in members])
    return rows, labels


def task_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy `(tasks,)` of every task over its examples: logits `(tasks, examples, classes)`, minus
    infinity for classes that are padding, and labels `(tasks, examples)` from 0, of which -1 marks padding."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="none")
    return losses.sum(dim=1) / (labels >= 0).sum(dim=1)


def task_accuracies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of its examples that every task's logits classify rightly: `(tasks,)`. See [`task_losses`]."""
    return (logits.argmax(dim=-1) == labels).sum(dim=1) / (labels >= 0).sum(dim=1)
