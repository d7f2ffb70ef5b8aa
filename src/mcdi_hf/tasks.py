"""Tasks: a few labelled examples to learn from, others to be judged on."""

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset


@dataclass(frozen=True)
class Task:
    """One classification problem over rows of a data set.

    Attributes:
        classes (`tuple[str, ...]`): The class names, in the order of the logits.
        support (`tuple[tuple[int, ...], ...]`): For each class the rows to learn from.
        query (`tuple[tuple[int, ...], ...]`): For each class the rows to be judged on; none is in `support`.
    """

    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]


class LabelledRows:
    """The rows of a data set by class, and its classes by group.

    Args:
        dataset (`datasets.Dataset`):
            Has a `ClassLabel` column of classes and may have one of groups.
        label_column (`str`):
            The column of classes.
        group_column (`str`, *optional*):
            The column of groups, such as domains or alphabets. Without it all classes are one group.
        span (`range`, *optional*):
            Keep these rows only: one split of a concatenated data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        label_column: str,
        group_column: str | None = None,
        span: range | None = None,
    ) -> None:
        labels, names = _column(dataset, label_column)
        if group_column is None:
            group_of_row, group_names = np.zeros(len(dataset), dtype=int), ["all"]
        else:
            group_of_row, group_names = _column(dataset, group_column)
        self.groups: dict[str, list[str]] = {}
        self.rows: dict[str, np.ndarray] = {}
        for index, group in enumerate(group_names):
            members = np.flatnonzero(group_of_row == index)
            if span is not None:
                members = members[(members >= span.start) & (members < span.stop)]
            for label in np.unique(labels[members]):
                if names[label] in self.rows:
                    first = next(other for other, classes in self.groups.items() if names[label] in classes)
                    raise ValueError(
                        f"The class {names[label]!r} lies in the groups {first!r} and {group!r}: a task of one would be "
                        f"given rows of the other. Name its classes apart."
                    )
                self.groups.setdefault(group, []).append(names[label])
                self.rows[names[label]] = members[labels[members] == label]
        if not self.rows:
            raise ValueError("The data set has no row.")


class EpisodeSampler:
    """Draws tasks of one group's classes, each from its own number: task 7 is the same whoever draws it, and when.

    Args:
        rows (`LabelledRows`): Where the support comes from.
        ways (`tuple[int, int]`): The least and the greatest number of classes.
        shots (`tuple[int, int]`): The least and the greatest number of support examples a class.
        queries (`int`): Query examples a class, fewer where a class has no more.
        seed (`int`, *optional*, defaults to 0): Another seed, other tasks.
        query_rows (`LabelledRows`, *optional*): Where the query comes from, if it is another split than the support.
    """

    def __init__(
        self,
        rows: LabelledRows,
        ways: tuple[int, int],
        shots: tuple[int, int],
        queries: int,
        seed: int = 0,
        query_rows: LabelledRows | None = None,
    ) -> None:
        self.rows, self.query_rows = rows, query_rows
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.groups = [group for group, classes in rows.groups.items() if len(classes) >= ways[1]]
        if not self.groups:
            raise ValueError(
                f"No group has {ways[1]} classes; they have { {g: len(c) for g, c in rows.groups.items()} }."
            )
        if query_rows is not None and (missing := sorted(set(rows.rows) - set(query_rows.rows))):
            raise ValueError(f"query_rows has no example of the classes {missing}.")
        short = {name: len(found) for name, found in rows.rows.items() if len(found) < shots[1] + (query_rows is None)}
        if short:
            raise ValueError(f"Too few examples for {shots[1]} shots and a query in the classes {short}.")

    def __getitem__(self, number: int) -> Task:
        random = np.random.default_rng((self.seed, number))
        group = self.groups[random.integers(len(self.groups))]
        ways = random.integers(self.ways[0], self.ways[1] + 1)
        shots = random.integers(self.shots[0], self.shots[1] + 1)
        classes = tuple(random.choice(self.rows.groups[group], size=ways, replace=False).tolist())
        support, query = [], []
        for name in classes:
            shuffled = random.permutation(self.rows.rows[name]).tolist()
            support.append(tuple(shuffled[:shots]))
            rest = (
                shuffled[shots:]
                if self.query_rows is None
                else random.permutation(self.query_rows.rows[name]).tolist()
            )
            query.append(tuple(rest[: self.queries]))
        return Task(classes, tuple(support), tuple(query))


def check_disjoint(**splits: LabelledRows) -> None:
    """Refuse splits that share a class: a task of one would be no test of what was learnt on another."""
    names = list(splits)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            shared = sorted(set(splits[first].rows) & set(splits[second].rows))
            if shared:
                raise ValueError(f"{first} and {second} share the classes {shared}.")


def _column(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    if column not in dataset.features:
        raise ValueError(f"The data set has no column {column!r}; it has {dataset.column_names}.")
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"Column {column!r} is a {feature}, expected a ClassLabel: use dataset.class_encode_column.")
    return np.asarray(dataset.with_format("numpy")[column][:]), feature.names
