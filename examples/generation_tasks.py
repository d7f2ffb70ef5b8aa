"""The pipelines and tasks that generation is timed on, and what an adapter is judged by."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import Source, inputs_of
from datasets import Dataset
from families import ROOT, labelled, load_pipeline, moved
from training_data import episodes

from mcdi_hf import GeneratedAdapter, LabelledRows, StackedLora, Task
from mcdi_hf.data.episodes import Episodes
from mcdi_hf.training.validation import support_texts
from mcdi_hf.backbones.layers import EncodedExamples


@dataclass
class TaskSet:
    """Tasks of one kind, with their examples and nothing else of the data set.

    Attributes:
        tasks (`list[Task]`): Their rows point into `inputs` and `examples`.
        inputs (`list`): Texts, pairs of texts or PIL images.
        examples (`EncodedExamples`): The same after the frozen lower layers.
    """

    tasks: list[Task]
    inputs: list[Any]
    examples: EncodedExamples

    @classmethod
    def of(cls, tasks: list[Task], table: Dataset, stacked: StackedLora) -> "TaskSet":
        """Read and encode what the tasks need of a table."""
        rows = sorted({row for task in tasks for members in task.support + task.query for row in members})
        places = {row: place for place, row in enumerate(rows)}

        def placed(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(places[row] for row in members) for members in groups)

        tasks = [replace(task, support=placed(task.support), query=placed(task.query)) for task in tasks]
        inputs = inputs_of(table.select(rows))
        return cls(tasks, inputs, stacked.encode(inputs))

    def support(self, number: int) -> dict[str, list[Any]]:
        """The support set of a task, as a user hands it in; behind the last task comes the first."""
        return support_texts(self.inputs, self.tasks[number % len(self.tasks)])

    def batch(self, first: int, count: int) -> list[dict[str, list[Any]]]:
        """`count` support sets from a task on."""
        return [self.support(first + number) for number in range(count)]

    def query(self, number: int) -> tuple[list[Any], torch.Tensor]:
        """The query examples of a task and their labels."""
        groups = self.tasks[number].query
        labels = torch.tensor([label for label, members in enumerate(groups) for _ in members])
        return [self.inputs[row] for members in groups for row in members], labels


class Workload:
    """A released pipeline and the tasks that it is timed and judged on.

    Args:
        values (`dict`): `name`; `pipeline` and, if it is not the wheel's, `backbone`, folders in the repository;
            `sources`, fields of [`Source`] with `dataset_name` below the data root; `test_domains` and
            `validation_domains`; `split`, optionally another `validation_split`, and optionally the `query_split` of
            both; `kinds` of test tasks, such as `5x1`, and `validation_kinds`.
        data_root (`Path`): A folder that holds the data sets.
    """

    def __init__(self, values: dict, data_root: Path) -> None:
        backbone = values.get("backbone")
        self.values, self.name = values, values["name"]
        self.pipe = load_pipeline(ROOT / values["pipeline"], backbone and ROOT / backbone)
        sources = [Source.from_dict(one) for one in moved(values["sources"], data_root)]
        split, query = values["split"], values.get("query_split")
        self._splits: dict[str, tuple[Dataset, list[LabelledRows]]] = {
            "test": labelled(sources, values["test_domains"], split, query),
            "validation": labelled(
                sources, values["validation_domains"], values.get("validation_split", split), query
            ),
        }

    def task_set(self, kind: str, seed: int, count: int, split: str = "test") -> TaskSet:
        """Tasks of a kind; a seed gives the same ones always."""
        table, rows = self._splits[split]
        return TaskSet.of(episodes(kind, *rows, seed=seed, count=count), table, self.pipe.stacked)


def adapter_accuracies(
    stacked: StackedLora, adapters: list[GeneratedAdapter], task_set: TaskSet, tasks_at_once: int = 16
) -> list[float]:
    """The share of right answers of the adapters of a task set's first tasks, each on the query of its own task."""
    found = []
    for first in range(0, len(adapters), tasks_at_once):
        part = adapters[first : first + tasks_at_once]
        tasks = task_set.tasks[first : first + len(part)]
        own = Episodes.of(tasks, stacked.device)
        tensors = {key: torch.stack([one.tensors[key] for one in part]).to(stacked.device) for key in part[0].tensors}
        inputs, words = task_set.examples[own.query.flatten()], stacked.word_heads([task.classes for task in tasks])
        with torch.no_grad():
            found += own.accuracies(stacked.logits(tensors, inputs, own.class_mask, words))
    return found
