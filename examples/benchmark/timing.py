"""Time from a task's examples to its adapter, and which methods are timed against each other: medians, in turn."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from fold import Fold
from splits import Split

from mcdi_hf import Task


def median_seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of every call, after one that is not counted.

    All are timed in turn, repeat after repeat, so that whatever else the machine does meets all of them.
    """
    for call in calls.values():
        call()
    found = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def asked_once(task: Task) -> Task:
    """The same task with one query a class, for timing what comes before the query."""
    return replace(task, query=tuple(members[:1] for members in task.query))


def seconds_to_adapter(
    split: Split, fold: Fold, methods: dict[str, tuple[Any, Any]], task: Task, seed: int
) -> dict[str, float]:
    """Seconds from the examples of one task to an adapter; one query a class is judged besides.

    Every method but SetFit begins with the support's pass through the frozen layers and the shared adapter, so that is
    added to each.

    Args:
        split (`Split`), fold (`Fold`): As in [`Method.accuracies`].
        methods (`dict`): Name -> the method and its setting.
        task (`Task`): The task.
        seed (`int`): As in [`Method.accuracies`].
    """
    task = asked_once(task)
    inputs = split.inputs([row for rows in task.support for row in rows])
    shared, stacked = fold.codec.shared_adapter(), fold.stacked
    calls = {"": lambda: stacked.features_of_all(shared, stacked.encode(inputs))}
    for name, (method, setting) in methods.items():
        calls[name] = lambda method=method, setting=setting: method.accuracies(split, fold, [task], seed, setting)
    found = median_seconds(calls, fold.sizes.timings)
    base = found.pop("")
    return {name: one + (base if methods[name][0].reads_encoded else 0) for name, one in found.items()}
