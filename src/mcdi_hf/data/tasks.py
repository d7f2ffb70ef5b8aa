"""Tasks: a few labelled examples to learn from, others to be judged on."""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from datasets import ClassLabel, Dataset, Image, concatenate_datasets
from PIL.Image import Transpose


ROTATIONS = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_270}


@dataclass(frozen=True)
class Task:
    """One classification problem over rows of a data set.

    Attributes:
        classes (`tuple[str, ...]`): The class names, in the order of the logits.
        support (`tuple[tuple[int, ...], ...]`): For each class the rows to learn from.
        query (`tuple[tuple[int, ...], ...]`): For each class the rows to be judged on; none is in `support`.
        group (`str`): The group that the classes are of.

    Example: `Task(classes=("yes", "no"), support=((0, 1), (2,)), query=((3,), (4,)), group="all")`
    """

    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[tuple[int, ...], ...]
    group: str


class LabelledRows:
    """The rows of a data set by group and class. A class is known by both: `negative` of books is not that of films.

    Args:
        dataset (`datasets.Dataset`): The data set; its columns below are `ClassLabel`s.
        label_column (`str`): The column of classes.
        group_column (`str`, *optional*): The column of groups, such as alphabets; by default all are one, `"all"`.
        span (`range`, *optional*): Keep these rows only: one split of a concatenated data set.
        domain_column (`str`, *optional*): The column of domains. A class may have rows in many; what is learnt in some
            of them is tested in others. By default a row's domain is its group.
        min_rows (`int`, *optional*, defaults to 1): Leave out classes of fewer rows.

    Attributes:
        groups (`dict[str, dict[str, np.ndarray]]`): Group -> class -> row numbers.
        origins (`set[tuple[str, str, str]]`): Domains, groups and classes as [`check_disjoint`] compares them: a class
            that [`rotate_classes`] made counts as the one that it was turned from.

    Example: `LabelledRows(dataset, "intent", group_column="domain").groups["banking"]["refund"]` are row numbers
    """

    def __init__(
        self,
        dataset: Dataset,
        label_column: str,
        group_column: str | None = None,
        span: range | None = None,
        domain_column: str | None = None,
        min_rows: int = 1,
    ) -> None:
        labels, names = class_column(dataset, label_column)
        turned = _unrotated(label_column) in dataset.features
        origins, origin_names = class_column(dataset, _unrotated(label_column)) if turned else (labels, names)
        groups, group_names = np.zeros(len(dataset), dtype=int), ["all"]
        if group_column is not None:
            groups, group_names = class_column(dataset, group_column)
        domains, domain_names = groups, group_names
        if domain_column is not None:
            domains, domain_names = class_column(dataset, domain_column)
        self.groups: dict[str, dict[str, np.ndarray]] = {}
        self.origins: set[tuple[str, str, str]] = set()
        for index, group in enumerate(group_names):
            members = np.flatnonzero(groups == index)
            if span is not None:
                members = members[(members >= span.start) & (members < span.stop)]
            if len(members):
                own = labels[members]
                classes = {names[label]: members[own == label] for label in np.unique(own)}
                self.groups[group] = {name: rows for name, rows in classes.items() if len(rows) >= min_rows}
                pairs = np.unique(np.stack([domains[members], origins[members]]), axis=1)
                self.origins |= {(domain_names[domain], group, origin_names[label]) for domain, label in pairs.T}
        if not self.groups:
            raise ValueError("The data set has no row.")


class EpisodeSampler:
    """Draws tasks of one group's classes, each from its own number: task 7 is the same whoever draws it, and when.

    Args:
        rows (`LabelledRows`): Where the support comes from.
        ways (`tuple[int, int]`): The least and the greatest number of classes. Groups of fewer than the least are left
            out; those of fewer than the greatest give tasks of up to all their classes.
        shots (`tuple[int, int]`): The least and the greatest number of support examples a class, see [`draw_shots`].
        queries (`int`): Query examples a class, fewer where a class has no more.
        seed (`int`, *optional*, defaults to 0): Another seed, other tasks.
        query_rows (`LabelledRows`, *optional*): Where the query comes from, if it is another split than the support.
        weights (`dict[str, float]`, *optional*): How often each group is drawn, relative to the others; by default all
            alike.

    Example: `EpisodeSampler(rows, ways=(2, 5), shots=(1, 16), queries=8)[0]` is a [`Task`]
    """

    def __init__(
        self,
        rows: LabelledRows,
        ways: tuple[int, int],
        shots: tuple[int, int],
        queries: int,
        seed: int = 0,
        query_rows: LabelledRows | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.rows, self.query_rows, self.weights = rows, query_rows, weights
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.groups = [group for group, classes in rows.groups.items() if len(classes) >= ways[0]]
        if not self.groups:
            sizes = {group: len(classes) for group, classes in rows.groups.items()}
            raise ValueError(f"No group has {ways[0]} classes; they have {sizes}.")
        counts = {(group, label): len(found) for group in self.groups for label, found in rows.groups[group].items()}
        if query_rows is not None:
            there = {(group, label) for group, own in query_rows.groups.items() for label in own}
            if missing := sorted(counts.keys() - there):
                raise ValueError(f"query_rows has no example of the classes {[_full_name(*one) for one in missing]}.")
        least = shots[1] + (query_rows is None)
        if short := {_full_name(*one): count for one, count in counts.items() if count < least}:
            raise ValueError(f"Too few examples for {shots[1]} shots and a query in the classes {short}.")

    def __getitem__(self, number: int) -> Task:
        random = np.random.default_rng((self.seed, number))
        group = self._group(self.ways[0], random)
        ways = random.integers(self.ways[0], min(self.ways[1], len(self.rows.groups[group])) + 1)
        return self._task(group, ways, draw_shots(self.shots, random), random)

    def draw(self, ways: int, shots: int, random: np.random.Generator, most_ways: int | None = None) -> Task:
        """A task of so many classes, of a group that has them, and so many shots, or as many as the smallest class has
        beside its queries. With `most_ways` it has as many classes as the group has, up to so many."""
        group = self._group(ways, random)
        if most_ways is not None:
            ways = min(most_ways, len(self.rows.groups[group]))
        if self.query_rows is not None:
            return self._task(group, ways, shots, random)
        task = self._task(group, ways, shots + self.queries, random)
        most = min(shots, *(len(rows) - self.queries for rows in task.support))
        support = tuple(rows[:most] for rows in task.support)
        return replace(task, support=support, query=tuple(rows[most:][: self.queries] for rows in task.support))

    def _group(self, ways: int, random: np.random.Generator) -> str:
        groups = [group for group in self.groups if len(self.rows.groups[group]) >= ways]
        if self.weights is None:
            return groups[random.integers(len(groups))]
        shares = np.array([self.weights[group] for group in groups])
        return groups[random.choice(len(groups), p=shares / shares.sum())]

    def _task(self, group: str, ways: int, shots: int, random: np.random.Generator) -> Task:
        rows = self.rows.groups[group]
        classes = tuple(random.choice(list(rows), size=ways, replace=False).tolist())
        support, query = [], []
        for name in classes:
            shuffled = random.permutation(rows[name]).tolist()
            support.append(tuple(shuffled[:shots]))
            rest = shuffled[shots:]
            if self.query_rows is not None:
                rest = random.permutation(self.query_rows.groups[group][name]).tolist()
            query.append(tuple(rest[: self.queries]))
        return Task(classes, tuple(support), tuple(query), group)


def draw_shots(shots: tuple[int, int], random: np.random.Generator) -> int:
    """Draw a number from the least to the greatest, evenly on a log axis; nothing is drawn where they are the same."""
    least, greatest = shots
    if least == greatest:
        return least
    drawn = np.exp(random.uniform(np.log(least), np.log(greatest + 1)))
    return int(np.clip(drawn, least, greatest))  # clipped, since rounding may carry an end over


def check_disjoint(**splits: LabelledRows) -> None:
    """Refuse splits that share a class of one group in one domain: one would not test what was learnt on another."""
    for first, second in combinations(splits, 2):
        if shared := sorted(splits[first].origins & splits[second].origins):
            raise ValueError(f"{first} and {second} share the classes {[_full_origin(*one) for one in shared]}.")


def rotate_classes(
    dataset: Dataset, image_column: str, label_column: str, angles: tuple[int, ...] = (90, 180, 270)
) -> Dataset:
    """Add a turned copy of every image, as an example of a new class: what few-shot work does with Omniglot.

    `image_column` is an `Image` column, `label_column` a `ClassLabel` one; the angles are degrees
    counter-clockwise, of 90, 180 and 270, so that pixels move and none is resampled. Returned are `(1 +
    len(angles)) * rows` rows: those of the data set, then the copies of all of them for each angle in turn, of the
    classes `"NAME rotated ANGLE"`. Splits are made first and rotated after; the column `LABEL_unrotated` keeps the
    first classes, and [`check_disjoint`] goes by it.

    Example: `rotate_classes(omniglot, "image", "character")` has four times the rows and classes
    """
    labels, names = class_column(dataset, label_column)
    unrotated = _unrotated(label_column)
    if unrotated in dataset.features:
        raise ValueError(f"Column {unrotated!r} says that it was rotated before: give all angles at once.")
    if not isinstance(dataset.features.get(image_column), Image):
        raise ValueError(f"Column {image_column!r} is no Image column; the data set has {dataset.features}.")
    if unknown := sorted(set(angles) - set(ROTATIONS)):
        raise ValueError(f"angles has {unknown}: expected some of {list(ROTATIONS)}, which need no resampling.")

    def turn(images: list, angle: int) -> dict[str, list]:
        return {image_column: [image.transpose(ROTATIONS[angle]) for image in images]}

    how = {"input_columns": image_column, "batched": True, "features": dataset.features}
    copies = [dataset.map(turn, fn_kwargs={"angle": angle}, **how) for angle in angles]
    origins = np.tile(labels, 1 + len(angles))
    shifts = len(names) * np.repeat(np.arange(1 + len(angles)), len(dataset))
    new_names = [*names, *(f"{name} rotated {angle}" for angle in angles for name in names)]
    table = concatenate_datasets([dataset, *copies]).remove_columns(label_column)
    table = table.add_column(label_column, origins + shifts, feature=ClassLabel(names=new_names))
    return table.add_column(unrotated, origins, feature=ClassLabel(names=names))


def _unrotated(label_column: str) -> str:
    return f"{label_column}_unrotated"


def _full_name(group: str, label: str) -> str:
    return label if group == "all" else f"{group}/{label}"


def _full_origin(domain: str, group: str, label: str) -> str:
    return _full_name(group, label) + ("" if domain == group else f" in {domain}")


def class_column(dataset: Dataset, column: str, dataset_name: str = "The data set") -> tuple[np.ndarray, list[str]]:
    """The class of every row of a `ClassLabel` column, as numbers `(rows,)`, and the names of the classes."""
    if column not in dataset.features:
        raise ValueError(f"{dataset_name} has no column {column!r}; it has {dataset.column_names}.")
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        expected = "expected a ClassLabel: use dataset.class_encode_column."
        raise ValueError(f"{dataset_name} has in column {column!r} a {feature}, {expected}")
    numbers = np.asarray(dataset.with_format("numpy")[column][:], dtype=int)
    if (numbers < 0).any():  # how data sets with a hidden test split mark its rows
        where = f"in column {column!r} of {(numbers < 0).sum()} rows, where it is -1"
        raise ValueError(f"{dataset_name} has no class {where}: give rows that have one.")
    return numbers, feature.names
