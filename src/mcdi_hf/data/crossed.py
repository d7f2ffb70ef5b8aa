"""Twin tasks: the same texts under two attributes, so that nothing but the labels says what is meant."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .tasks import LabelledRows, Task, draw_shots


def identities(inputs: list) -> np.ndarray:
    """A number for every row of a table's inputs `(rows,)`: equal texts have equal numbers."""
    numbers: dict = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in inputs])


@dataclass
class _Crossing:
    """Two groups that label the same texts: their classes, the rows of each cell, and what can be crossed, which is
    pairs of classes of the first group with all classes of the second that have enough rows beside both."""

    groups: tuple[str, str]
    cells: dict[tuple[str, str], np.ndarray]
    choices: list[tuple[tuple[str, str], list[str]]]


class CrossedSampler:
    """Draws twins: 2-way tasks over the same examples, two classes of one group crossed with two of another.

    All four cells are equally filled, in support and query: an example's class in one task says nothing of its class in
    the other. A generator that does not read labels treats both tasks alike.

    Args:
        rows (`LabelledRows`): Groups, some of which label the same examples.
        identities (`np.ndarray` of shape `(rows,)`): Which rows are the same example, see [`identities`].
        shots (`tuple[int, int]`): The least and the greatest number of support examples a class; odd ones are raised by
            one, since a class has as many of each class of the other group.
        queries (`int`): Query examples a class, an even number.
        seed (`int`, *optional*, defaults to 0): Another seed, other tasks.

    Raises:
        `ValueError`: when `queries` is odd, or no two groups can be crossed.
    """

    def __init__(
        self, rows: LabelledRows, identities: np.ndarray, shots: tuple[int, int], queries: int, seed: int = 0
    ) -> None:
        if queries % 2:
            raise ValueError(f"queries is {queries}: expected an even number, half of it for each crossed class.")
        self.shots, self.queries, self.seed = shots, queries, seed
        self.needed = (shots[1] + 1) // 2 + queries // 2
        labelled = {group: _labelled(classes, identities) for group, classes in rows.groups.items()}
        found = (self._cross(pair, labelled) for pair in combinations(labelled, 2))
        self.crossings = [crossing for crossing in found if crossing is not None]
        if not self.crossings:
            raise ValueError(
                f"No two of the groups {list(rows.groups)} label the same examples in two classes each, {self.needed} of "
                "every combination: leave crossed tasks out, or add a source that labels the same texts otherwise."
            )

    def twins(self, number: int, shots: int | None = None) -> tuple[Task, Task]:
        """Two tasks over the same examples, labelled by one group and by the other. `shots` are drawn unless given."""
        random = np.random.default_rng((self.seed, number, 2))
        half = ((draw_shots(self.shots, random) if shots is None else shots) + 1) // 2
        crossing = self.crossings[random.integers(len(self.crossings))]
        first, others = crossing.choices[random.integers(len(crossing.choices))]
        second = random.choice(others, size=2, replace=False).tolist()
        first = random.permutation(first).tolist()
        count = half + self.queries // 2
        drawn = [[random.choice(crossing.cells[c, d], count, replace=False) for d in second] for c in first]
        return (
            self._task(crossing.groups[0], first, drawn, half),
            self._task(crossing.groups[1], second, list(zip(*drawn)), half),
        )

    @staticmethod
    def _task(group: str, classes: list[str], drawn: list, half: int) -> Task:
        support = tuple(tuple(np.concatenate([cell[:half] for cell in cells]).tolist()) for cells in drawn)
        query = tuple(tuple(np.concatenate([cell[half:] for cell in cells]).tolist()) for cells in drawn)
        return Task(tuple(classes), support, query, group)

    def _cross(self, pair: tuple[str, str], labelled: dict[str, tuple]) -> _Crossing | None:
        """What can be crossed of two groups, the one of fewer classes first."""
        groups = tuple(sorted(pair, key=lambda group: len(labelled[group][2])))
        (texts, rows, names, numbers), (others, _, other_names, other_numbers) = (labelled[one] for one in groups)
        _, place, other_place = np.intersect1d(texts, others, assume_unique=True, return_indices=True)
        if len(place) < 4 * self.needed:
            return None
        codes = numbers[place] * len(other_names) + other_numbers[other_place]
        order = np.argsort(codes, kind="stable")
        known, starts = np.unique(codes[order], return_index=True)
        cells = {}
        for code, members in zip(known.tolist(), np.split(rows[place][order], starts[1:])):
            if len(members) >= self.needed:
                cells[names[code // len(other_names)], other_names[code % len(other_names)]] = members
        beside: dict[str, set] = {}
        for name, other in cells:
            beside.setdefault(name, set()).add(other)
        shared = ((both, sorted(beside[both[0]] & beside[both[1]])) for both in combinations(sorted(beside), 2))
        choices = [(both, others) for both, others in shared if len(others) > 1]
        return _Crossing(groups, cells, choices) if choices else None


def _labelled(classes: dict[str, np.ndarray], identities: np.ndarray) -> tuple:
    """A group's texts in order, a row of each, its classes' names, and each text's class. A text that has two classes
    has none here."""
    rows = np.concatenate(list(classes.values()))
    numbers = np.repeat(np.arange(len(classes)), [len(own) for own in classes.values()])
    pairs = np.unique(np.stack([identities[rows], numbers]), axis=1)
    texts, counts = np.unique(pairs[0], return_counts=True)
    kept, first = np.unique(identities[rows], return_index=True)
    single = np.isin(kept, texts[counts == 1])
    return kept[single], rows[first[single]], list(classes), numbers[first[single]]
