"""Gradient LoRA as a rival: its settings, its accuracy on many tasks, and the choice of settings on validation."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mcdi_hf import LabelledRows, StackedLora, Task, TrajectorySettings, collect_trajectories
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.shared import initial_adapter


HEADS = ("imprinted", "untrained")
MAX_BATCH = 64  # examples of a step; smaller support sets are taken whole


@dataclass(frozen=True)
class GradientSettings:
    """How the rival trains.

    Attributes:
        head (`str`): `"imprinted"` starts from class means on frozen features, `"untrained"` from zero, as a person
            does who follows PEFT's documentation.
        steps (`int`): Adam's steps, each on the whole support set or on `MAX_BATCH` examples of it.
        learning_rate (`float`): Adam's, with a linear decay to zero.
    """

    head: str
    steps: int
    learning_rate: float

    def scale(self, imprint_scale: float) -> float:
        """The sharpness of the head that training starts from: 0 makes an untrained one."""
        return imprint_scale if self.head == "imprinted" else 0.0


def gradient_accuracies(
    stacked: StackedLora,
    examples: EncodedExamples,
    frozen_features: torch.Tensor,
    tasks: list[Task],
    settings: GradientSettings,
    imprint_scale: float,
    seed: int = 0,
    stack_size: int = 8,
) -> list[float]:
    """Train on the support of each task, `stack_size` tasks a pass, and return the accuracies on their queries.

    Heads are imprinted on `frozen_features`, what the head of the plain backbone reads of every example.
    """
    found = []
    for first in range(0, len(tasks), stack_size):
        stack = tasks[first : first + stack_size]
        trajectory = TrajectorySettings(
            num_steps=settings.steps,
            num_targets=1,
            batch_size=min(MAX_BATCH, sum(len(rows) for rows in stack[0].support)),
            learning_rate=settings.learning_rate,
            imprint_scale=settings.scale(imprint_scale),
            seed=seed,
        )
        numbers = list(range(first, first + len(stack)))
        start = initial_adapter(stacked.layout, seed)
        found += [
            row["accuracy"]
            for row in collect_trajectories(stacked, examples, start, frozen_features, stack, numbers, trajectory)
        ]
    return found


def all_data_tasks(tasks: list[Task], rows: LabelledRows, most: int) -> list[Task]:
    """The same tasks with nearly all the examples that there are to learn from: with them the rival is a ceiling.

    Args:
        tasks (`list[Task]`): The tasks.
        rows (`LabelledRows`): Where their support comes from.
        most (`int`): Examples of a class at most: the task's own shots, then others of `rows`, drawn by the task's place
            in the list. None is of its query.

    Returns:
        Tasks of the same classes and queries.
    """
    result = []
    for number, task in enumerate(tasks):
        random, support = np.random.default_rng(number), []
        for name, shots, query in zip(task.classes, task.support, task.query):
            if name not in rows.groups.get(task.group, {}):
                raise ValueError(f"rows has no example of the class {name!r} of the group {task.group!r}.")
            if most < len(shots):
                raise ValueError(f"most is {most}: expected the {len(shots)} shots of a task at least.")
            others = np.setdiff1d(rows.groups[task.group][name], [*shots, *query])
            support.append((*shots, *random.permutation(others)[: most - len(shots)].tolist()))
        result.append(replace(task, support=tuple(support)))
    return result


def choose_settings(
    path: Path,
    steps: list[int],
    learning_rates: list[float],
    score: Callable[[int, GradientSettings], float],
    shots: Sequence[int],
    heads: Sequence[str] = HEADS,
) -> dict[tuple[str, int], GradientSettings]:
    """Try every setting on validation and keep the best for each head and number of shots.

    Args:
        path (`Path`): What was tried, a line of JSON each; settings found there are not tried again.
        steps (`list[int]`), learning_rates (`list[float]`): The grid.
        score (`Callable`): `(shots, settings) -> mean accuracy`.
        shots (`Sequence[int]`): The numbers of shots to choose settings for.
        heads (`Sequence[str]`, *optional*): The heads to choose settings for, some of `HEADS`.

    Returns:
        `(head, shots)` -> settings.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tried = {(line["shots"], GradientSettings(**line["settings"])): line["accuracy"] for line in lines}
    settings = itertools.starmap(GradientSettings, itertools.product(heads, steps, learning_rates))
    grid = list(itertools.product(shots, settings))
    for pair in tqdm([pair for pair in grid if pair not in tried], desc="tuning gradient LoRA"):
        tried[pair] = score(*pair)
        line = {"shots": pair[0], "settings": asdict(pair[1]), "accuracy": tried[pair]}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print("Gradient LoRA on validation")
    for count, one in grid:
        text = f"{one.head:<9} head, {one.steps:>4} steps, learning rate {one.learning_rate:g}"
        print(f"  {count}-shot, {text}: {tried[count, one]:.4f}")
    best = {}
    for head, count in itertools.product(heads, shots):
        own = [pair for pair in grid if pair[0] == count and pair[1].head == head]
        best[head, count] = max(own, key=tried.get)[1]
    return best
