import numpy as np
import pytest
from PIL import Image

from mcdi_hf import Task
from mcdi_hf.trajectories import augmentation
from mcdi_hf.data.augmentation import augmented_views, draw_views, random_affine, word_dropout


def blob(mode: str = "L") -> Image.Image:
    """A bright square a little off the centre of a dark image, away from the edges."""
    pixels = np.zeros((40, 40), dtype=np.uint8)
    pixels[16:22, 18:24] = 255
    return Image.fromarray(pixels).convert(mode)


def test_an_affine_view_of_no_range_is_the_image_itself(monkeypatch) -> None:
    for name in ("MAX_DEGREES", "MAX_SHEAR", "MAX_LOG_SCALE", "MAX_SHIFT"):
        monkeypatch.setattr(augmentation, name, 0.0)
    image = blob()
    assert np.array_equal(random_affine(image, np.random.default_rng(0)), image)


@pytest.mark.parametrize("name, distance", [("MAX_DEGREES", 1.5), ("MAX_SHEAR", 1.0), ("MAX_SHIFT", 4.5)])
def test_each_movement_stays_within_its_range(monkeypatch, name: str, distance: float) -> None:
    """The centre of the square moves, but not farther than the range lets it; its brightness is kept."""
    for other in {"MAX_DEGREES", "MAX_SHEAR", "MAX_LOG_SCALE", "MAX_SHIFT"} - {name}:
        monkeypatch.setattr(augmentation, other, 0.0)
    image, rows = blob(), np.arange(40)
    moves = []
    for seed in range(20):
        pixels = np.asarray(random_affine(image, np.random.default_rng(seed)), dtype=float)
        centre = np.array([pixels.sum(axis=0) @ rows, pixels.sum(axis=1) @ rows]) / pixels.sum()
        moves.append(np.abs(centre - [20.5, 18.5]).max())
        assert pixels.sum() == pytest.approx(36 * 255, rel=0.05)
    assert 0 < min(moves) and max(moves) <= distance


def test_scaling_changes_the_area_by_at_most_its_square(monkeypatch) -> None:
    for other in ("MAX_DEGREES", "MAX_SHEAR", "MAX_SHIFT"):
        monkeypatch.setattr(augmentation, other, 0.0)
    areas = [np.asarray(random_affine(blob(), np.random.default_rng(seed))).sum() / 255 / 36 for seed in range(30)]
    assert 0.6 < min(areas) < 0.8 and 1.2 < max(areas) < 1.55


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "RGBA"])
def test_mode_and_size_are_kept(mode: str) -> None:
    view = random_affine(blob(mode).resize((30, 20)), np.random.default_rng(1))
    assert view.mode == mode and view.size == (30, 20)


def test_words_are_left_out_at_the_stated_rate_and_in_order() -> None:
    words = [f"w{index}" for index in range(200)]
    counts = []
    for seed in range(50):
        kept = word_dropout(" ".join(words), np.random.default_rng(seed)).split()
        assert kept == [word for word in words if word in set(kept)]
        counts.append(len(kept))
    assert np.mean(counts) == pytest.approx(170, abs=3)  # 200 * 0.85, with a standard error of 0.7


def test_no_text_is_emptied() -> None:
    assert {word_dropout("one", np.random.default_rng(seed)) for seed in range(100)} == {"one"}
    assert word_dropout("", np.random.default_rng(0)) == ""


def test_views_depend_on_seed_view_and_row_alone() -> None:
    texts = [" ".join("abcdefghijklmnop") for _ in range(3)]
    views = augmented_views(texts, 3, seed=5)
    assert views[:3] == texts and len(set(views[3:])) == 6
    assert augmented_views(texts[:1], 2, seed=5)[1] == views[3]
    assert augmented_views(texts, 1) == texts and augmented_views(texts, 3, seed=6)[3:] != views[3:]
    pair = augmented_views([(texts[0], texts[0])], 2)[1]
    assert isinstance(pair, tuple) and pair[0] != pair[1]
    assert isinstance(augmented_views([blob()], 2)[1], Image.Image)


def test_a_task_of_views_has_the_same_examples() -> None:
    task = Task(("a", "b"), ((0, 3), (5, 6)), ((1,), (9,)), "all")
    moved = draw_views(task, 10, 4, np.random.default_rng(0))
    for classes, rows in ((task.support, moved.support), (task.query, moved.query)):
        assert [[row % 10 for row in own] for own in rows] == [list(own) for own in classes]
    views = {row // 10 for own in (*moved.support, *moved.query) for row in own}
    assert len(views) > 1 and views <= set(range(4))
    assert draw_views(task, 10, 1, np.random.default_rng(0)) == task
