"""Other views of an example: images moved a little, texts short of a word."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from .tasks import Task


MAX_DEGREES = 15.0
MAX_SHEAR = 0.2
MAX_LOG_SCALE = math.log(1.2)
MAX_SHIFT = 0.1
WORD_DROPOUT = 0.15


def random_affine(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Rotate, shear, scale and shift an image a little, about its centre; its mode and size stay.

    By at most 15 degrees, 0.2, a factor of 1.2 and a tenth of the size, each drawn uniformly (the scale on a log axis).
    What comes in from outside is black.
    """
    angle = math.radians(random.uniform(-MAX_DEGREES, MAX_DEGREES))
    shear = random.uniform(-MAX_SHEAR, MAX_SHEAR)
    scale = math.exp(random.uniform(-MAX_LOG_SCALE, MAX_LOG_SCALE))
    shift = random.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * image.size
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / scale
    centre = (np.array(image.size) - 1) / 2
    # PIL asks where each pixel of the result comes from
    offset = centre - matrix @ (centre + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR)


def word_dropout(text: str, random: np.random.Generator) -> str:
    """Leave out each word with a probability of 0.15, but never all of them."""
    words = text.split()
    kept = random.random(len(words)) >= WORD_DROPOUT
    return " ".join(word for word, keep in zip(words, kept) if keep) if kept.any() else text


def augmented_views(examples: list[Any], num_views: int, seed: int = 0) -> list[Any]:
    """The examples as they are, followed by `num_views - 1` augmented views of all of them, see
    [`EncodedExamples`]. A view depends on the seed, its number and the example's, and nothing else."""
    pairs = [(view, row) for view in range(1, num_views) for row in range(len(examples))]
    return [*examples, *(_augment(examples[row], np.random.default_rng((seed, view, row))) for view, row in pairs)]


def draw_views(task: Task, num_examples: int, num_views: int, random: np.random.Generator) -> Task:
    """A task over any views of its examples, see [`augmented_views`]: a view is drawn for each row of a table of
    `num_examples`. With one view the task stays what it is and nothing is drawn."""
    if num_views == 1:
        return task

    def draw(classes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple((np.array(rows) + num_examples * random.integers(num_views, size=len(rows))).tolist())
            for rows in classes
        )

    return replace(task, support=draw(task.support), query=draw(task.query))


def _augment(example: Any, random: np.random.Generator) -> Any:
    if isinstance(example, tuple):
        return tuple(word_dropout(text, random) for text in example)
    return word_dropout(example, random) if isinstance(example, str) else random_affine(example, random)
