"""Twins: the same examples under two attributes, and stacks of tasks of one shape."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from mcdi_hf import EpisodeSampler, LabelledRows, Source
from mcdi_hf.data.crossed import CrossedSampler, identities
from mcdi_hf.data.kinds import tasks_of_kind
from mcdi_hf.data.sources import group_weights, normalized
from mcdi_hf.data.stacks import StackSampler


COLOURS, SHAPES = ["red", "green", "blue"], ["round", "square"]


def table() -> Dataset:
    """Texts by colour, the same texts by shape, and others by size; every combination of colour and shape has 12."""
    names = [*COLOURS, *SHAPES, "large", "small"]
    texts = [(f"{c} {s} {n}", c, s) for c in COLOURS for s in SHAPES for n in range(12)]
    rows = [(text, colour, "colour") for text, colour, _ in texts] + [
        (text, shape, "shape") for text, _, shape in texts
    ]
    rows += [(f"{size} {n}", size, "size") for size in ("large", "small") for n in range(20)]
    groups = ["colour", "shape", "size"]
    features = Features(
        {"input": Value("string"), "label": ClassLabel(names=names), "group": ClassLabel(names=groups)}
    )
    columns = {"input": [one[0] for one in rows], "label": [one[1] for one in rows], "group": [one[2] for one in rows]}
    return Dataset.from_dict(columns, features=features)


TABLE = table()
ROWS = LabelledRows(TABLE, "label", "group")
TEXTS = TABLE["input"][:]


def make(shots: tuple[int, int] = (1, 8), queries: int = 4) -> CrossedSampler:
    return CrossedSampler(ROWS, identities(TEXTS), shots, queries, seed=3)


def test_equal_inputs_have_equal_numbers() -> None:
    assert identities(["a", "b", "a", ("a", "b"), ("a", "b")]).tolist() == [0, 1, 0, 2, 2]


def test_twins_are_the_same_texts_with_all_cells_equally_filled() -> None:
    sampler = make()
    seen = set()
    for number in range(40):
        first, second = sampler.twins(number)
        assert {first.group, second.group} == {"colour", "shape"} and len(first.classes) == len(second.classes) == 2
        for part in ("support", "query"):
            cells = {}
            for name, rows in zip(first.classes, getattr(first, part)):
                for row in rows:
                    cells[TEXTS[row]] = [name]
            for name, rows in zip(second.classes, getattr(second, part)):
                for row in rows:
                    cells[TEXTS[row]].append(name)
            found = {pair: list(map(tuple, cells.values())).count(pair) for pair in map(tuple, cells.values())}
            assert len(found) == 4 and len(set(found.values())) == 1
            assert all(name in text.split() for text, names in cells.items() for name in names)
        assert not {TEXTS[row] for own in first.support for row in own} & {
            TEXTS[row] for own in first.query for row in own
        }
        assert sampler.twins(number) == (first, second)
        seen.add((len(first.support[0]), first.classes, second.classes))
    assert {shots for shots, _, _ in seen} == {2, 4, 6, 8} and len(seen) > 12


def test_what_cannot_be_crossed_is_refused() -> None:
    with pytest.raises(ValueError, match="queries is 3: expected an even number"):
        make(queries=3)
    with pytest.raises(ValueError, match="No two of the groups .* label the same examples"):
        make(shots=(1, 40))
    alone = LabelledRows(TABLE, "label", "group", span=range(0, 72))
    with pytest.raises(ValueError, match="leave crossed tasks out"):
        CrossedSampler(alone, identities(TEXTS), (1, 2), 2)


def test_a_text_of_two_classes_of_one_group_is_in_neither() -> None:
    doubled = TABLE.add_item({"input": TEXTS[0], "label": COLOURS.index("blue"), "group": 0})
    texts = doubled["input"][:]
    sampler = CrossedSampler(LabelledRows(doubled, "label", "group"), identities(texts), (1, 4), 2)
    for number in range(60):
        for task in sampler.twins(number):
            assert TEXTS[0] not in {texts[row] for own in (*task.support, *task.query) for row in own}


def test_a_stack_is_of_one_shape_and_the_same_again() -> None:
    sampler = StackSampler(EpisodeSampler(ROWS, (2, 3), (1, 6), 4, seed=5), 0.5, make((1, 6)), 0.5)
    shapes, twins, ways = set(), 0, []
    for number in range(60):
        tasks = sampler.stack(number, 6)
        sizes = {(len(task.classes), *map(len, task.support), *map(len, task.query)) for task in tasks}
        assert len(tasks) == 6 and len(sizes) == 1 and tasks == sampler.stack(number, 6)
        shapes |= sizes
        ways.append(len(tasks[0].classes))
        pairs = [{TEXTS[row] for own in task.support for row in own} for task in tasks]
        twins += sum(one == two for one, two in zip(pairs[::2], pairs[1::2]))
    assert len(shapes) > 6 and 0.6 < ways.count(2) / 60 < 0.9 and 20 < twins < 100


def test_without_twins_no_even_shots_are_asked_for() -> None:
    sampler = StackSampler(EpisodeSampler(ROWS, (2, 2), (3, 3), 4))
    assert {len(task.support[0]) for task in sampler.stack(0, 4)} == {3}


def test_groups_are_drawn_by_the_weights_of_their_sources() -> None:
    sources = [Source("a", name="one", weight=3), Source("b", name="two")]
    rows = LabelledRows(TABLE, "label", "group")
    rows.groups = dict(zip(("one/x", "one/y", "two"), rows.groups.values()))
    weights = group_weights(sources, rows)
    assert weights == {"one/x": 1.5, "one/y": 1.5, "two": 1.0}
    sampler = EpisodeSampler(rows, (2, 2), (1, 1), 1, weights=weights)
    drawn = [sampler[number].group for number in range(3000)]
    shares = {group: drawn.count(group) / 3000 for group in weights}
    assert shares == pytest.approx({"one/x": 0.375, "one/y": 0.375, "two": 0.25}, abs=0.03)


def test_a_task_takes_what_its_smallest_class_leaves_for_the_query() -> None:
    sampler = EpisodeSampler(ROWS, (2, 2), (1, 1), 4)
    random = np.random.default_rng(0)
    for _ in range(20):
        task = sampler.draw(2, 100, random)
        fewest = min(len(ROWS.groups[task.group][name]) for name in task.classes)
        assert {len(own) for own in task.support} == {fewest - 4} and {len(own) for own in task.query} == {4}


def test_classes_of_few_rows_are_left_out() -> None:
    assert set(LabelledRows(TABLE, "label", "group", min_rows=21).groups["size"]) == set()
    assert set(LabelledRows(TABLE, "label", "group", min_rows=20).groups["size"]) == {"large", "small"}


def test_kinds_of_tasks_by_name() -> None:
    own = {"seed": 1, "count": 6, "identities": identities(TEXTS)}
    crossed = tasks_of_kind("crossed:2x4", ROWS, queries=5, **own)
    assert len(crossed) == 6 and {len(task.query[0]) for task in crossed} == {6}
    rows = LabelledRows(TABLE, "label", "group")
    rows.groups = dict(zip(("looks/colour", "looks/shape", "size"), rows.groups.values()))
    assert {task.group for task in tasks_of_kind("looks/*:2x1", rows, **own)} == {"looks/colour", "looks/shape"}
    assert {task.group for task in tasks_of_kind("size:2x1", rows, **own)} == {"size"}
    for kind in ("crossed:3x2", "2-1", "looks", "1x5", "2x0"):
        with pytest.raises(ValueError, match="is unknown: expected WAYSxSHOTS"):
            tasks_of_kind(kind, rows, **own)
    with pytest.raises(ValueError, match=r"There are no tasks of the kind 'taste:2x1'.*expected one of the groups"):
        tasks_of_kind("taste:2x1", rows, **own)
    with pytest.raises(ValueError, match="'crossed:2x4' of images: expected texts"):
        tasks_of_kind("crossed:2x4", ROWS, seed=1, count=6)


def test_texts_are_compared_by_letters_and_digits() -> None:
    assert normalized("It's  No. 7 !") == normalized("its no 7") == "itsno7"
