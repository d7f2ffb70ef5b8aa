"""The seal: no test task before all choices are made, none twice, none under other choices."""

import json
import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES

from mcdi_hf import Task


sys.path.insert(0, str(EXAMPLES))

from benchmark_seal import Sealed  # noqa: E402


PLAN = {"fold": "all", "seed": 0, "kind": "2x1"}
TASKS = [Task(("a", "b"), ((0,), (1,)), ((2,), (3,)), "all")]


def refused() -> list[Task]:
    raise AssertionError("a test task was drawn")


def judge(tasks: list[Task]) -> dict:
    return {"accuracy": {"way": [0.5] * len(tasks)}}


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    sealed = Sealed(tmp_path, {"episodes": 1})
    sealed.choose("steps", lambda: 10)
    sealed.close()
    sealed.measure(PLAN, lambda: TASKS, judge)
    return tmp_path


def test_no_test_task_is_drawn_before_the_seal_is_closed(tmp_path: Path) -> None:
    sealed = Sealed(tmp_path, {})
    with pytest.raises(ValueError, match="before the seal .* was closed"):
        sealed.measure(PLAN, refused, judge)
    assert not sealed.lines_path.exists()


def test_nothing_is_chosen_behind_the_seal(closed: Path) -> None:
    sealed = Sealed(closed, {"episodes": 1})
    assert sealed.choose("steps", refused) == 10  # what was chosen before is only read
    with pytest.raises(ValueError, match="'rate' was not chosen before the seal"):
        sealed.choose("rate", lambda: 1e-3)


def test_test_tasks_are_drawn_once(closed: Path) -> None:
    sealed = Sealed(closed, {"episodes": 1})
    sealed.measure(PLAN, refused, judge)
    sealed.measure(PLAN | {"seed": 1}, lambda: TASKS, judge)
    seals = {line["seal"] for line in Sealed(closed, {"episodes": 1}).lines}
    assert seals == {sealed.seal} and len(Sealed(closed, {"episodes": 1}).lines) == 2


def test_other_settings_are_refused(closed: Path) -> None:
    with pytest.raises(ValueError, match="episodes is 1 there, 2 here"):
        Sealed(closed, {"episodes": 2})


def test_choices_that_were_edited_do_not_go_with_the_results(closed: Path) -> None:
    path = closed / "choices.json"
    kept = json.loads(path.read_text())
    for edited, said in ({}, "was edited after"), ({"seal": None}, "results under another seal"):
        path.write_text(json.dumps(kept | {"choices": {"steps": 30}} | edited))
        with pytest.raises(ValueError, match=said):
            Sealed(closed, {"episodes": 1})


def test_a_line_that_was_cut_off_is_measured_again(closed: Path) -> None:
    path = closed / "lines.jsonl"
    path.write_text(path.read_text() + '{"plan": {"fold"')
    sealed = Sealed(closed, {"episodes": 1})
    assert len(sealed.lines) == 1
    sealed.measure(PLAN | {"seed": 1}, lambda: TASKS, judge)
    assert [json.loads(line)["plan"]["seed"] for line in path.read_text().splitlines()] == [0, 1]
