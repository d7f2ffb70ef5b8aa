"""The choice of the rival's settings on validation."""

import json
import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES
from tiny import tiny_dataset

from mcdi_hf import EpisodeSampler, LabelledRows, Task


sys.path.insert(0, str(EXAMPLES))

from gradient_rival import HEADS, GradientSettings, all_data_tasks, choose_settings  # noqa: E402


def test_the_best_settings_of_each_head_are_chosen_and_none_is_tried_twice(tmp_path: Path) -> None:
    tried = []

    def score(shots: int, settings: GradientSettings) -> float:
        """Few shots want few steps, an untrained head a great learning rate."""
        tried.append((shots, settings))
        sign = 1 if settings.head == "untrained" else -1
        return 0.5 - 0.01 * abs(settings.steps - 10 * shots) + sign * settings.learning_rate

    path, grid = tmp_path / "tried.jsonl", ([10, 30], [0.001, 0.005])
    imprinted = choose_settings(path, *grid, score, shots=[1], heads=["imprinted"])
    assert imprinted == {("imprinted", 1): GradientSettings("imprinted", 10, 0.001)} and len(tried) == 4
    best = choose_settings(path, *grid, score, shots=(1, 3))
    assert len(tried) == len(set(tried)) == len(path.read_text().splitlines()) == 2 * 2 * 2 * 2
    assert best == {
        (head, shots): GradientSettings(head, 10 * shots, 0.005 if head == "untrained" else 0.001)
        for head in HEADS
        for shots in (1, 3)
    }
    assert choose_settings(path, *grid, score, shots=(1, 3)) == best and len(tried) == 16
    assert json.loads(path.read_text().splitlines()[0])["settings"]["head"] == "imprinted"


def test_all_data_is_every_example_of_the_classes_but_the_query() -> None:
    rows = LabelledRows(tiny_dataset(), "label", "domain")  # eight examples a class
    sampler = EpisodeSampler(rows, (2, 3), (1, 2), 3)
    tasks = [sampler[number] for number in range(5)]
    for task, whole in zip(tasks, all_data_tasks(tasks, rows, most=100), strict=True):
        assert (whole.classes, whole.query, whole.group) == (task.classes, task.query, task.group)
        for name, shots, support, query in zip(task.classes, task.support, whole.support, task.query):
            assert support[: len(shots)] == shots and len(support) == len(set(support)) == 8 - len(query)
            assert {*support, *query} == set(rows.groups[task.group][name].tolist())
    fewer = all_data_tasks(tasks, rows, most=4)
    assert fewer == all_data_tasks(tasks, rows, most=4)
    for task, part in zip(tasks, fewer):
        assert all(len(support) == len(set(support)) == 4 for support in part.support)
        assert all(support[: len(shots)] == shots for shots, support in zip(task.support, part.support))
        assert not {row for support in part.support for row in support} & {row for rows in task.query for row in rows}
    full = [pair for pair in zip(tasks, all_data_tasks(tasks, rows, most=2)) if len(pair[0].support[0]) == 2]
    assert full and all(task == same for task, same in full)


def test_a_ceiling_below_the_shots_and_an_unknown_class_are_refused() -> None:
    rows = LabelledRows(tiny_dataset(), "label", "domain")
    with pytest.raises(ValueError, match="most is 1: expected the 2 shots"):
        all_data_tasks([Task(("class_0",), ((0, 1),), ((2,),), "north")], rows, most=1)
    with pytest.raises(ValueError, match="no example of the class 'class_0' of the group 'south'"):
        all_data_tasks([Task(("class_0",), ((0, 1),), ((2,),), "south")], rows, most=5)
