"""Figures of accuracy stand only where a script put them: `tests/benchmark/test_report.py` holds these against the results."""

import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "benchmark"))

from report import MARKS, with_block  # noqa: E402


FIGURE = re.compile(r"±|\d\.\d+ ?%|\b\d+(?:\.\d+)? (?:points|percent)\b|\b0\.\d{3}\b(?!\.)")
PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/reproduce/cards/*.md")]
MADE = {"benchmark.md", "paper.md", "experiments.md"}  # two reports', and lessons, whose figures are of validation


@pytest.mark.parametrize("path", [one for one in PAGES if one.name not in MADE], ids=lambda path: path.name)
def test_no_figure_is_written_by_hand(path: Path) -> None:
    assert not FIGURE.findall(path.read_text())


def test_readme_has_figures_between_its_marks_alone() -> None:
    text = (ROOT / "README.md").read_text()
    inside = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert FIGURE.search(inside) and not FIGURE.findall(with_block(text, "").replace("0.998...", ""))


@pytest.mark.parametrize("name", ["mcdi-minilm-text", "mcdi-omniglot-vit"])
def test_a_card_has_figures_in_its_table_alone(name: str) -> None:
    text = (ROOT / "model_cards" / name / "README.md").read_text()
    table = text.partition("## How good it is\n")[2].partition("\n## Limits\n")[0]
    assert FIGURE.search(table) and not FIGURE.findall(text.replace(table, ""))
