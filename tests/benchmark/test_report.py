"""The report: the pages that are there, and what they say of invented results."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from generators import ROOT
from intervals import paired_difference
from memorisation import BETWEEN, NEW, NOISED_COPY, OVERLAP, memorisation_text
from methods import METHODS
from pictures import chain_picture, shots_picture, time_picture
from report import (
    CONFIGS,
    MARKS,
    accuracy_table,
    card_figures,
    check_results,
    difference,
    page,
    points,
    read_results,
    readme_block,
    with_block,
)
from run import read_config


RESULTS = ROOT / "examples" / "benchmark" / "results"
GRADIENT, LOGISTIC = "gradient LoRA", "frozen + logistic regression"


def invented() -> dict:
    """Two kinds, two seeds of four episodes. Mc-Di: 0.9, 0.9, 0.7, 0.7. Others are 0.1 below it, but for those named.

    Gradient LoRA saw the first two episodes, which are easy; SetFit the first, of one kind.
    """
    own, kinds = [0.9, 0.9, 0.7, 0.7], ["sst2:2x5", "style:3x5"]
    values = {name: [round(one - 0.1, 4) for one in own] for name in METHODS} | {"Mc-Di": own}
    values |= {LOGISTIC: [0.85, 0.85, 0.65, 0.65], GRADIENT: [0.82, 0.82]}
    accuracy = {name: {kind: {"all-0": one, "all-1": one} for kind in kinds} for name, one in values.items()}
    accuracy["SetFit"] = {"sst2:2x5": {"all-0": [0.9]}}
    chain = {kind: {"all-0": [0.6, 0.8]} for kind in kinds}
    return {
        "experiment": "drawings",
        "title": "Drawings of a few",
        "kinds": kinds,
        "command": "python examples/benchmark/run.py --config drawings.json",
        "machine": "1 core",
        "versions": {},
        "sizes": {"queries": 5},
        "seal": "0123",
        "accuracy": accuracy,
        "seconds": {"Mc-Di": 0.05, GRADIENT: 12.0},
        "time_kind": "sst2:2x5",
        "choices": {},
        "memorisation": {
            NEW: {"all-0": [3.0], "all-1": [4.0]},
            BETWEEN: {"all": [1.0, 1.2]},
            NOISED_COPY: {"all-0": [0.1], "all-1": [0.2]},
            OVERLAP: {"all-0": [0.5], "all-1": [None]},
        },
        "chain": {"Mc-Di": {"0": chain, "20": chain}},
        "spent": {},
    }


def test_pages_and_figures_are_those_of_the_results() -> None:
    """What stands in docs, README and the releases' figures was computed from the single episodes that are kept."""
    found, said = read_results(RESULTS), "run `python examples/benchmark/report.py`"
    assert (ROOT / "docs" / "benchmark.md").read_text() == page(found), said
    readme = (ROOT / "README.md").read_text()
    assert readme == with_block(readme, readme_block(found["text"])), said
    for name, results in {"mcdi-minilm-text": "text", "mcdi-omniglot-vit": "omniglot"}.items():
        figures = json.loads((ROOT / "model_cards" / name / "results.json").read_text())
        config = read_config(CONFIGS / f"{results}.json")
        assert figures == card_figures(found[results], figures, config), said


def test_a_row_says_accuracy_difference_and_time() -> None:
    lines = {line.split(" | ")[0].strip("| *"): line for line in accuracy_table(invented()).splitlines()}
    assert lines["accuracy, %"] == "| accuracy, % | sst2 | style, 3-way | mean | Mc-Di minus it | time |"
    assert lines["Mc-Di"] == "| **Mc-Di** | **80.0** | **80.0** | **80.0** | - | 50 ms |"
    # Gradient LoRA's mean of 82 is above the 75 of logistic regression, but on easier episodes.
    assert lines[GRADIENT] == f"| {GRADIENT} | 82.0 | 82.0 | 82.0 | +8.0 ±0.0 | 12.0 s |"
    assert lines[LOGISTIC].startswith(f"| {LOGISTIC} | 75.0 | 75.0 | 75.0 | +5.0 ±")
    assert lines["SetFit"] == "| SetFit | 90.0 | - | - | +0.0 ±? (tie) | - |"


def test_many_kinds_are_told_by_their_shots() -> None:
    results = invented()
    results["kinds"] = [f"{name}:2x{shots}" for shots in (1, 16) for name in "abcdefg"]
    own = {kind: {"all-0": [0.5 if kind.endswith("x1") else 0.75] * 2} for kind in results["kinds"]}
    results["accuracy"] = {"Mc-Di": own}
    assert "| 1 shot, 7 data sets | 16 shots, 7 data sets |" in accuracy_table(results)
    assert "| **50.0** | **75.0** |" in accuracy_table(results)


def test_a_difference_is_paired_and_the_mean_of_kinds() -> None:
    results = invented()
    results["accuracy"][GRADIENT]["style:3x5"] = {"all-0": [0.88, 0.92]}  # Mc-Di: 0.9, 0.9
    found = difference(results, "Mc-Di", GRADIENT)
    assert found.mean == pytest.approx((0.08 + 0.0) / 2) and found.count == 6
    first, second = (
        paired_difference(results["accuracy"]["Mc-Di"][kind], results["accuracy"][GRADIENT][kind])
        for kind in results["kinds"]
    )
    assert found.half_width == pytest.approx(np.hypot(first.half_width, second.half_width) / 2)
    assert points(found).endswith("(tie)") == (found.half_width >= 0.04)


def test_a_block_is_put_between_its_marks() -> None:
    text = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter"
    assert with_block(text, "new") == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter"
    with pytest.raises(ValueError, match="README.md has no marks"):
        with_block("nothing", "new")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ([3.0, 4.0], "so it is no copy"),
        ([1.05, 1.15], "as far as a newly trained one would"),
        ([0.5, 0.6], "but farther than a training adapter with noise"),
        ([0.1, 0.15], "as a copy would"),
        ([0.2, 0.5], "but farther than a training adapter with noise"),  # on each task, though the levels overlap
    ],
)
def test_distances_say_whether_it_may_be_a_copy(new: list[float], said: str) -> None:
    results = invented()
    results["memorisation"] |= {NEW: {"all-0": new}, BETWEEN: {"all": [1.0, 1.2, 1.0, 1.2]}}
    results["memorisation"][NOISED_COPY] = {"all-0": [0.1, 0.4 if new[1] == 0.5 else 0.2]}
    assert said in memorisation_text(results) and "they share 50 % of their errors." in memorisation_text(results)


def test_pictures_show_what_the_tables_say() -> None:
    results, later = invented(), invented()
    figure, found = time_picture(results), {}
    for container in figure.axes[0].containers:
        ((_, low), (_, high)) = container.lines[2][0].get_segments()[0]
        found[round(float(container.lines[0].get_xdata()[0]), 3)] = (low, high)
    expected = difference(results, GRADIENT, "Mc-Di")
    assert found[12.0] == pytest.approx((100 * expected.low, 100 * expected.high)) and set(found) == {0.05, 12.0}
    later["kinds"] = ["sst2:2x16"]
    later["accuracy"] = {"Mc-Di": {"sst2:2x16": {"all-0": [0.95, 0.85]}}}
    every, few = shots_picture(results, later).axes
    (line,) = few.lines
    assert line.get_xdata().tolist() == [5, 16] and line.get_ydata().tolist() == pytest.approx([80, 90])
    assert every.get_title() == "mean of 2 data sets" and every.lines[0].get_xdata().tolist() == [5]
    curve = chain_picture(results).axes[0].lines[0]
    assert curve.get_xdata().tolist() == [0, 20] and curve.get_ydata().tolist() == pytest.approx([70, 70])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda results: results.pop("seal"), r"'drawings' have no \['seal'\]"),
        (lambda results: results["accuracy"].update(guessing={}), r"has the methods \['guessing'\]"),
        (lambda results: results["accuracy"]["Mc-Di"].pop("sst2:2x5"), r"no accuracy of Mc-Di for \['sst2:2x5'\]"),
        (lambda results: results["accuracy"][LOGISTIC]["sst2:2x5"]["all-0"].append(0.5), "expected 1 to 4 accuracies"),
        (
            lambda results: results["accuracy"][LOGISTIC]["sst2:2x5"].update({"all-0": [np.nan]}),
            "accuracies of 0 to 1",
        ),
        (lambda results: results["accuracy"][LOGISTIC]["sst2:2x5"].update({"all-9": [0.5]}), "all-9: expected 1 to 0"),
    ],
)
def test_results_that_no_report_can_be_made_of_are_refused(break_it, message: str) -> None:
    results = copy.deepcopy(invented())
    check_results(results)
    break_it(results)
    with pytest.raises(ValueError, match=message):
        check_results(results)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(invented()))
    with pytest.raises(ValueError, match="holds 'drawings': expected 'other', as its name"):
        read_results(tmp_path)
