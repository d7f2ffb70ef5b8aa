"""The page of the paper's regime, made of what was measured."""

import json
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .block_runs import STEPS as BLOCK_STEPS
from .summary import NAMES


HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
RESULTS, PAGE, IMAGES = HERE / "results.json", ROOT / "docs" / "paper.md", ROOT / "docs" / "images"


def interval(found: dict) -> str:
    return f"{found['mean']:.1f} ±{found['half']:.1f}"


def with_seeds(found: dict) -> str:
    return f"{interval(found)} (sd {found['seeds']:.1f})"


def signed(found: dict) -> str:
    mean = round(found["mean"], 1) + 0.0  # no minus before a zero
    return f"{mean:+.1f} ±{found['half']:.1f} ({found['above']} of {found['count']} seeds)"


def both(found: dict) -> str:
    return f"{found['sampled']['mean']:.1f} ({found['mean']['mean']:.1f})"


def values(numbers: list[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


def point(results: dict, number: int) -> dict:
    """A point of the curves on one level: the step, and the mean accuracy of every objective."""
    curves = results["order"]["single"]["curve"]
    found = {one: f"{_mean(curve[number]['accuracy']):.1f}" for one, curve in curves.items()}
    return found | {"step": curves["mc"][number]["step"]}


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def curve_rows(results: dict) -> list[list[str]]:
    """Step, level and the mean accuracy of every objective."""
    rows = []
    for level, title in {"bi": "two levels", "single": "one level"}.items():
        for points in zip(*(results["order"][level]["curve"][one] for one in NAMES)):
            accuracies = [f"{_mean(one['accuracy']):.1f}" for one in points]
            rows.append([f"{points[0]['step']}, {title}", *accuracies])
    return rows


def page(results: dict) -> str:
    """docs/paper.md."""
    loader = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True)
    left = [(row["value"], both(row["mc"])) for row in results["num_segments"]]
    right = [(row["value"], both(row["mc"]), both(row["mv"])) for row in results["num_train_timesteps"]]
    short = {"e": interval, "s": with_seeds, "d": signed, "b": both, "v": values}
    return loader.get_template("page.md.j2").render(
        **results,
        **short,
        names=NAMES,
        early=point(results, 0),
        late=point(results, -1),
        curve_rows=curve_rows(results),
        segments_and_timesteps=list(zip_longest(left, right)),
        block_steps=BLOCK_STEPS,
    )


def read_results() -> dict:
    return json.loads(RESULTS.read_text())
