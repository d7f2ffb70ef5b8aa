"""LoRA trained by gradient descent for each task: on its shots, in the time of a generation, or on all data."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from fold import Fold
from splits import TASKS_AT_ONCE, VALIDATION_SEED, Sizes, Split, Tensors
from timing import asked_once, median_seconds

from mcdi_hf import LabelledRows, Task
from mcdi_hf.adapters.head import RidgeHead
from mcdi_hf.pipelines.refinement import train_on_support
from mcdi_hf.trajectories.shared import initial_adapter

from .base import SlowMethod
from .mcdi import Generated
from .reptile import reptile_start
from .shared_adapter import equal_shared


def start_of(fold: Fold, name: str, seed: int) -> tuple[Tensors, RidgeHead]:
    """Where training starts, key -> `(1, *shape)`, and what makes the first head: PEFT's own initialisation is
    `"nothing"`, `"shared"` is the equal shared adapter, and `"reptile"` a start that REPTILE made."""
    if name == "shared":
        return equal_shared(fold)
    if name == "reptile":
        return reptile_start(fold), fold.codec.head
    return initial_adapter(fold.codec.layout, seed), fold.codec.head


def lora_accuracies(
    split: Split, fold: Fold, tasks: list[Task], start: tuple[Tensors, RidgeHead], steps: int, learning_rate: float
) -> list[float]:
    """Train matrices and head on the support of each task, many tasks a pass: Adam with a linear decay to zero, from the
    start's matrices and the head in closed form of what they make of the support; from a head of zero the same steps
    end lower. It runs in the precision that the generators' training had."""
    (matrices, head), found = start, []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        part = tasks[first : first + TASKS_AT_ONCE]
        support = split.support(part)
        own = fold.whole(matrices, head, support)
        with fold.autocast():
            own = train_on_support(fold.stacked, own, support, steps, learning_rate)
        found += split.whole(own, part)
    return found


@dataclass(frozen=True)
class GradientLora(SlowMethod):
    """LoRA on the task's shots; validation chooses steps and learning rate.

    Attributes:
        start (`str`, *optional*, defaults to `"nothing"`): See [`start_of`].
    """

    start: str = "nothing"

    @property
    def needs_training(self) -> bool:
        return self.start != "nothing"

    def settings(self, split: Split, fold: Fold, shots: int) -> list[list]:
        return [list(one) for one in itertools.product(fold.sizes.gradient_steps, fold.sizes.gradient_learning_rates)]

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: list) -> list[float]:
        return lora_accuracies(split, fold, tasks, start_of(fold, self.start, seed), *setting)


class TimedLora(GradientLora):
    """The same for as many steps as fit into the time of one generation, which is measured; at least one."""

    def settings(self, split: Split, fold: Fold, shots: int) -> list[list]:
        kind = next(one for one in fold.config["validation_kinds"] if one.endswith(f"x{shots}"))
        tasks, seed = [asked_once(split.tasks(kind, VALIDATION_SEED, 1)[0])], fold.generator.seeds[0]
        method, start, steps = Generated("", "", candidates=8), start_of(fold, self.start, seed), 5
        calls = {
            "generating": lambda: method.accuracies(split, fold, tasks, seed, None),
            "training": lambda: lora_accuracies(split, fold, tasks, start, steps, 1e-3),
        }
        seconds = median_seconds(calls, fold.sizes.timings)
        fitting = max(1, round(seconds["generating"] / (seconds["training"] / steps)))
        return [[fitting, rate] for rate in fold.sizes.gradient_learning_rates]


class LoraOnAllData(SlowMethod):
    """A ceiling: nearly all the examples that there are of a task's classes."""

    group = "ceiling"

    def episodes(self, sizes: Sizes, task: Task) -> int:
        return min(sizes.ceiling_episodes, super().episodes(sizes, task))

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: None) -> list[float]:
        sizes = fold.sizes
        tasks = all_data_tasks(tasks, split.rows[0], sizes.ceiling_examples)
        rate = max(sizes.gradient_learning_rates)
        return lora_accuracies(split, fold, tasks, start_of(fold, "nothing", seed), sizes.ceiling_steps, rate)


def all_data_tasks(tasks: list[Task], rows: LabelledRows, most: int) -> list[Task]:
    """The same tasks with more examples in their supports.

    Args:
        tasks (`list[Task]`): The tasks.
        rows (`LabelledRows`): Where the examples come from; none of a task's query is taken.
        most (`int`): Examples of a class at most, but never less than its own shots, which come first.
    """
    result = []
    for number, task in enumerate(tasks):
        random, support = np.random.default_rng(number), []
        for name, shots, query in zip(task.classes, task.support, task.query):
            others = np.setdiff1d(rows.groups[task.group][name], [*shots, *query])
            support.append((*shots, *random.permutation(others)[: max(0, most - len(shots))].tolist()))
        result.append(replace(task, support=tuple(support)))
    return result
