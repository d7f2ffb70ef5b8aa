"""The pictures of the benchmark, from small results of every shape."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import EXAMPLES


sys.path.insert(0, str(EXAMPLES))

from benchmark_pictures import COLUMNS, LOOKS, kind_text, panels_for, save_pictures, shot_series  # noqa: E402
from benchmark_ways import CEILING, FROZEN, GRADIENT, MC_DI, ONE_DRAW, RIVALS, SETFIT, SHARED, WAYS  # noqa: E402
from picture_style import plt, seconds_axis, seconds_text, with_palette  # noqa: E402


def table(name: str, kinds: list[str], without: str | None = None) -> dict:
    """A table with two folds and a seed, in which a way may not have been run."""
    random, ways = np.random.default_rng(0), [way for way in WAYS if way != without]
    accuracy = {
        way: {kind: {f"{fold}-0": random.uniform(0.5, 1, 6).tolist() for fold in ("a", "b")} for kind in kinds}
        for way in ways
    }
    seconds = {way: 0.01 * 2**place for place, way in enumerate(ways)}
    return {
        "name": name,
        "title": f"The table {name}",
        "kinds": kinds,
        "accuracy": accuracy,
        "seconds": seconds,
        "time_kind": kinds[0],
    }


STEPS = {
    "table": "one",
    "kind": "sentiment:2x5",
    "frozen": [0.5, 0.7],
    "generated": {"1": [0.6, 0.7], "20": [0.7, 0.9]},
    "gradient": {"1": [0.5, 0.7], "30": [0.6, 0.8], "4": [0.5, 0.8]},
}
CHAIN = {
    "table": "one",
    "classes": ["yes", "no"],
    "shots": 5,
    "trajectory": [[-3.0, 1.0], [0.0, -1.0], [3.0, 0.0]],
    "targets": [[0.0, -1.0], [3.0, 0.0]],
    "chains": [[[0.0, 3.0], [1.0, 2.0], [2.0, 1.0]], [[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]]],
    "passages": [1, 2],
    "free": [0.5, 3.0],
    "adapter": [2.5, 1.0],
    "losses": {"free": 0.7, "adapter": 0.5, "target 1": 0.6, "target 2": 0.55},
    "adapter_in_plane": 0.014,
    "grid": {"x": [-4.0, 0.0, 4.0], "y": [-2.0, 4.0], "loss": [[0.9, 0.7, 0.5], [0.8, 0.6, 0.0]]},
    "variance_explained": [0.9, 0.06],
}


def colours_of(path: Path) -> tuple[tuple[int, int], set[tuple[int, int, int]]]:
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    return pixels.size, {colour for _, colour in pixels.getcolors(maxcolors=2**20)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def test_every_picture_is_drawn_in_the_colours_of_its_ways(tmp_path: Path) -> None:
    kinds = ["2x1", "2x5", "sentiment:2x5"]
    results = {"family": "tiny", "tables": [table("one", kinds), table("two", kinds, SETFIT)]}
    written = save_pictures(results | {"steps": STEPS, "chain": CHAIN}, tmp_path / "images")
    names = ["time", "shots", "steps", "chain"]
    assert written == [tmp_path / "images" / f"tiny_{name}.png" for name in names]
    shown = [
        [*RIVALS, ONE_DRAW, MC_DI],
        [FROZEN, SHARED, GRADIENT, MC_DI],
        [FROZEN, GRADIENT, MC_DI],
        [GRADIENT, MC_DI],
    ]
    for path, ways in zip(written, shown):
        size, colours = colours_of(path)
        assert size[0] > 600 and size[1] > 450 and path.stat().st_size < 120_000
        assert {rgb(LOOKS[way][0]) for way in ways} | {(255, 255, 255)} <= colours
    assert not plt.get_fignums()


def test_only_what_there_is_is_drawn(tmp_path: Path) -> None:
    alone = table("one", ["5x1", "10x5"])
    del alone["seconds"][MC_DI], alone["accuracy"][CEILING]
    assert save_pictures({"family": "tiny", "tables": [alone]}, tmp_path) == [tmp_path / "tiny_time.png"]


def test_shots_are_compared_within_a_group_and_a_number_of_classes() -> None:
    own = table("one", ["2x16", "2x4", "sentiment:2x1", "5x1", "sentiment:2x2"])
    del own["accuracy"][GRADIENT]["2x16"]
    found = shot_series(own)
    assert list(found) == ["2-way", "sentiment: 2-way"]
    assert list(found["2-way"][MC_DI]) == [4, 16] and list(found["2-way"][GRADIENT]) == [4]
    values = [100 * value for group in own["accuracy"][MC_DI]["2x4"].values() for value in group]
    mean, half = found["2-way"][MC_DI][4]
    assert mean == pytest.approx(np.mean(values)) and half == pytest.approx(1.96 * np.std(values) / 12**0.5)


@pytest.mark.parametrize(
    "count, shape", [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (5, (2, 3)), (6, (2, 3)), (7, (3, 3))]
)
def test_panels_make_a_grid(count: int, shape: tuple[int, int]) -> None:
    figure, panels = panels_for("Accuracy", count)
    found = panels[0].get_gridspec().get_geometry()
    plt.close(figure)
    assert len(panels) == len(figure.axes) == count and found == shape and found[1] <= COLUMNS


def test_texts() -> None:
    assert kind_text("5x1") == "5-way 1-shot" and kind_text("sentiment:2x16") == "sentiment: 2-way 16-shot"
    assert [seconds_text(value, 0) for value in (0.001, 0.1, 1, 100)] == ["1 ms", "100 ms", "1 s", "100 s"]


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (2.3, 6.2, ["3 s", "4 s", "6 s"]),
        (0.21, 0.9, ["300 ms", "400 ms", "600 ms"]),
        (0.5, 4.5, ["600 ms", "1 s", "2 s", "3 s", "4 s"]),
        (0.05, 2, ["100 ms", "1 s"]),
    ],
)
def test_an_axis_of_times_has_labels_however_short_it_is(low: float, high: float, labels: list[str]) -> None:
    figure, axes = plt.subplots()
    seconds_axis(axes, "time")
    axes.set_xlim(low, high)
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    figure.canvas.draw()
    shown = sorted((tick.get_loc(), tick.label1.get_text()) for tick in ticks if low <= tick.get_loc() <= high)
    plt.close(figure)
    assert [text for _, text in shown if text] == labels


def test_a_palette_keeps_areas_however_small_and_loses_but_gradients() -> None:
    pixels = np.zeros((40, 256, 3), dtype=np.uint8)
    pixels[:20] = np.arange(256)[None, :, None]  # stripes, one pixel wide: most colours, no area
    pixels[38:, :2] = (10, 200, 30)
    small = with_palette(Image.fromarray(pixels), size=8)
    assert small.mode == "P" and len(small.getcolors()) == 8
    assert small.convert("RGB").getpixel((1, 39)) == (10, 200, 30)
    assert small.convert("RGB").getpixel((100, 30)) == (0, 0, 0)
