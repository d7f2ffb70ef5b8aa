"""The choice of the rival's settings on validation."""

import json
import sys
from pathlib import Path

from scripts import EXAMPLES


sys.path.insert(0, str(EXAMPLES))

from gradient_rival import HEADS, GradientSettings, choose_settings  # noqa: E402


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
