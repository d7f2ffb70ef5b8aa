"""The seal: no test task before all choices are made, none twice, none under other choices."""

import json
from pathlib import Path

import pytest
from seal import Sealed

from mcdi_hf import Task


PLAN = "all-0-2x1"
TASKS = [Task(("a", "b"), ((0,), (1,)), ((2,), (3,)), "all")]


def refused() -> list[Task]:
    raise AssertionError("a test task was drawn")


def judge(tasks: list[Task]) -> dict:
    return {"accuracy": {"method": [0.5] * len(tasks)}}


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
    assert not sealed.results_folder.exists()


def test_nothing_is_chosen_behind_the_seal(closed: Path) -> None:
    sealed = Sealed(closed, {"episodes": 1})
    assert sealed.choose("steps", refused) == 10  # what was chosen before is only read
    with pytest.raises(ValueError, match="'rate' was not chosen before the seal"):
        sealed.choose("rate", lambda: 1e-3)


def test_test_tasks_are_drawn_once(closed: Path) -> None:
    sealed = Sealed(closed, {"episodes": 1})
    first = sealed.measure(PLAN, refused, judge)
    sealed.measure("all-1-2x1", lambda: TASKS, judge)
    again = Sealed(closed, {"episodes": 1})
    assert list(again.results) == [PLAN, "all-1-2x1"] and again.results[PLAN] == first
    assert {found["seal"] for found in again.results.values()} == {sealed.seal}


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


def test_choices_are_kept_one_by_one(tmp_path: Path) -> None:
    Sealed(tmp_path, {}).choose("steps", lambda: 10)
    sealed = Sealed(tmp_path, {})
    assert sealed.choose("steps", refused) == 10 and sealed.seal is None
    sealed.choose("rate", lambda: 1e-3)
    assert Sealed(tmp_path, {}).choices == {"steps": 10, "rate": 1e-3}
