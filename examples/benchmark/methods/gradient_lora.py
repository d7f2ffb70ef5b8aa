"""LoRA trained by gradient descent for each task: on its shots, in the time of a generation, or on all data."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from fold import Fold
from splits import TASKS_AT_ONCE, VALIDATION_SEED, Split
from timing import asked_once, median_seconds

from mcdi_hf import LabelledRows, Task
from mcdi_hf.pipelines.refinement import train_on_support
from mcdi_hf.trajectories.shared import initial_adapter

from .base import SlowMethod
from .mcdi import Generated


def lora_accuracies(
    split: Split, fold: Fold, tasks: list[Task], seed: int, steps: int, learning_rate: float
) -> list[float]:
    """Train matrices and head on the support of each task, many tasks a pass: Adam with a linear decay to zero, from PEFT's
    own start and the head in closed form of the frozen features; from a head of zero the same steps end lower."""
    start, found = initial_adapter(fold.codec.layout, seed), []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        part = tasks[first : first + TASKS_AT_ONCE]
        support = split.support(part)
        own = {key: value.to(fold.stacked.device).repeat(len(part), 1, 1) for key, value in start.items()}
        with torch.no_grad():
            own = fold.codec.complete(own, support, fold.stacked)
        found += split.whole(train_on_support(fold.stacked, own, support, steps, learning_rate), part)
    return found


class GradientLora(SlowMethod):
    """LoRA on the task's shots; validation chooses steps and learning rate."""

    def settings(self, split: Split, fold: Fold, shots: int) -> list[list]:
        return [list(one) for one in itertools.product(fold.sizes.gradient_steps, fold.sizes.gradient_learning_rates)]

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: list) -> list[float]:
        return lora_accuracies(split, fold, tasks, seed, *setting)


class TimedLora(GradientLora):
    """The same for as many steps as fit into the time of one generation, which is measured; at least one."""

    def settings(self, split: Split, fold: Fold, shots: int) -> list[list]:
        kind = next(one for one in fold.config["validation_kinds"] if one.endswith(f"x{shots}"))
        tasks, seed = [asked_once(split.tasks(kind, VALIDATION_SEED, 1)[0])], fold.generator.seeds[0]
        method, steps, repeats = Generated("", "", candidates=8), 5, fold.sizes.timings
        calls = {
            "generating": lambda: method.accuracies(split, fold, tasks, seed, None),
            "training": lambda: lora_accuracies(split, fold, tasks, seed, steps, 1e-3),
        }
        seconds = median_seconds(calls, repeats)
        fitting = max(1, round(seconds["generating"] / (seconds["training"] / steps)))
        return [[fitting, rate] for rate in fold.sizes.gradient_learning_rates]


class LoraOnAllData(SlowMethod):
    """A ceiling: nearly all the examples that there are of a task's classes."""

    group = "ceiling"

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: None) -> list[float]:
        sizes = fold.sizes
        tasks = all_data_tasks(tasks, split.rows[0], sizes.ceiling_examples)
        return lora_accuracies(split, fold, tasks, seed, sizes.ceiling_steps, max(sizes.gradient_learning_rates))


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
