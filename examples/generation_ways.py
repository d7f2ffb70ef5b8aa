"""The ways from a support set to an adapter that are timed against each other."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation_tasks import TaskSet, Workload, adapter_accuracies
from gradient_rival import GradientSettings, choose_settings, gradient_accuracies
from peft import LoraConfig
from setfit_rival import SetFitRival
from tqdm.auto import tqdm

from mcdi_hf.evaluation.gradient import gradient_lora
from mcdi_hf.trajectories.shared import initial_adapter


GRADIENT, SETFIT, FREE = "gradient LoRA", "SetFit", "mean adapter, imprinted head"
STEPS, BATCHES = (20, 8, 4, 2, 1), (1, 8, 64)
SETFIT_REPEATS = 3  # it takes seconds, and seconds are told apart by few repeats
# What a user may do with more time, at the pipeline's own number of steps.
CHOSEN = {
    "best of 8 and of what is free": {"num_candidates": 8, "combine": "select"},
    "mean of 8": {"num_candidates": 8, "combine": "mean"},
    "5 steps of refinement": {"refine_steps": 5},
}


def generated_name(steps: int) -> str:
    return f"generated, {steps} step{'s' if steps > 1 else ''}"


@dataclass
class Way:
    """A way from support sets to adapters.

    Attributes:
        name (`str`): What it is called in the tables.
        make (`Callable`): Support sets -> adapters; this is what is timed.
        accuracies (`Callable`): Task set -> the share of right answers on each of its tasks, or on the first of them.
        batches (`tuple[int, ...]`): How many support sets are handed in at once.
        repeats (`int`, *optional*): Timed so often at most, because it is slow.
    """

    name: str
    make: Callable[[list[dict]], Any]
    accuracies: Callable[[TaskSet], list[float]]
    batches: tuple[int, ...] = (1,)
    repeats: int | None = None


def generated_ways(workload: Workload) -> list[Way]:
    """The pipeline at all numbers of steps, with what more time buys, and what is free."""
    pipe = workload.pipe

    def judged(make: Callable, task_set: TaskSet) -> list[float]:
        # the same starting noise for every way; the noise of more steps goes on from there
        adapters = make(task_set.batch(0, len(task_set.tasks)), generator=torch.Generator().manual_seed(0))
        return adapter_accuracies(pipe.stacked, adapters, task_set)

    def made(supports: list[dict], options: dict, generator: torch.Generator | None = None) -> list:
        return pipe(supports, generator=generator, **options).adapters

    def free(supports: list[dict], generator: torch.Generator | None = None) -> list:
        return [pipe.baseline(support) for support in supports]

    plans = [(FREE, free, (1,))]
    for steps in STEPS:
        plans.append((generated_name(steps), partial(made, options={"num_inference_steps": steps}), BATCHES))
    for name, options in CHOSEN.items():
        plans.append((f"generated, {name}", partial(made, options=options), (1,)))
    return [Way(name, make, partial(judged, make), batches) for name, make, batches in plans]


def choose_gradient_settings(
    workload: Workload, steps: list[int], learning_rates: list[float], count: int
) -> dict[int, GradientSettings]:
    """Gradient LoRA's best settings for each number of shots, on `count` validation tasks of each kind."""
    stacked, scale = workload.pipe.stacked, workload.pipe.codec.config.imprint_scale
    frozen = initial_adapter(stacked.layout)  # does nothing: lora_B is zero
    sets = {}
    for kind in workload.values["validation_kinds"]:
        task_set = workload.task_set(kind, seed=100, count=count, split="validation")
        sets[int(kind.split("x")[-1])] = task_set, stacked.features_of_all(frozen, task_set.examples)

    def score(shots: int, settings: GradientSettings) -> float:
        task_set, features = sets[shots]
        return float(
            np.mean(gradient_accuracies(stacked, task_set.examples, features, task_set.tasks, settings, scale))
        )

    with tempfile.TemporaryDirectory() as folder:  # a run is short: it starts anew
        best = choose_settings(
            Path(folder) / "tried.jsonl", steps, learning_rates, score, shots=sorted(sets), heads=["imprinted"]
        )
    return {shots: settings for (_, shots), settings in best.items()}


def gradient_way(workload: Workload, settings: GradientSettings, count: int) -> Way:
    """PEFT's loop for one task, as a person writes it.

    Its accuracy is that of the same steps on the first `count` tasks, many at once, which is faster.
    """
    pipe = workload.pipe
    config, scale = LoraConfig(**pipe.codec.config.lora_config), pipe.codec.config.imprint_scale

    def make(supports: list[dict]) -> list:
        return [
            gradient_lora(pipe.backbone, one, config, settings.steps, settings.learning_rate, scale)
            for one in supports
        ]

    def accuracies(task_set: TaskSet) -> list[float]:
        tasks, examples = task_set.tasks[:count], task_set.examples
        features = pipe.stacked.features_of_all(initial_adapter(pipe.stacked.layout), examples)
        return gradient_accuracies(pipe.stacked, examples, features, tasks, settings, scale)

    return Way(GRADIENT, make, accuracies)


def setfit_way(workload: Workload, count: int) -> Way:
    """SetFit on the same backbone, on the first `count` tasks."""
    rival = SetFitRival(workload.pipe.config.base_model_name_or_path)

    def make(supports: list[dict]) -> list:
        return [rival.fit(support) for support in supports]

    def accuracies(task_set: TaskSet) -> list[float]:
        numbers = range(min(count, len(task_set.tasks)))
        return [rival.accuracy(rival.fit(task_set.support(number)), *task_set.query(number)) for number in numbers]

    return Way(SETFIT, make, accuracies, repeats=SETFIT_REPEATS)


def measure(ways: list[Way], task_set: TaskSet, repeats: int, title: str) -> list[dict]:
    """A row for each way: its accuracy on every task, and the seconds of every repeat at every batch.

    All are timed in turn, repeat after repeat, so that whatever else the machine does meets all of them; a repeat takes
    the same tasks for all.
    """
    found = [{"way": way.name, "accuracy": way.accuracies(task_set)} for way in tqdm(ways, desc=f"{title}: accuracy")]
    calls = [(row, way, batch) for row, way in zip(found, ways) for batch in way.batches]
    for row, way, batch in calls:
        row.setdefault("seconds", {})[str(batch)] = []
        way.make(task_set.batch(0, batch))  # the first call of a shape is slower than all others
    for repeat in tqdm(range(repeats), desc=f"{title}: time"):
        for row, way, batch in calls:
            if way.repeats is None or repeat < way.repeats:
                supports = task_set.batch(repeat * batch, batch)
                start = time.perf_counter()
                way.make(supports)
                row["seconds"][str(batch)].append(time.perf_counter() - start)
    return found


def median_seconds(row: dict, batch: int = 1) -> float:
    """The median time of a call in a row of [`measure`]."""
    return statistics.median(row["seconds"][str(batch)])


def all_ways(
    workload: Workload,
    gradient: dict[int, GradientSettings],
    kind: str,
    gradient_episodes: int,
    setfit_episodes: int,
) -> list[Way]:
    """What is timed on tasks of a kind, gradient LoRA first; SetFit reads texts only."""
    ways = [gradient_way(workload, gradient[int(kind.split("x")[-1])], gradient_episodes)]
    if not workload.pipe.backbone.reads_images:
        ways.append(setfit_way(workload, setfit_episodes))
    return ways + generated_ways(workload)


def settings_as_dict(gradient: dict[int, GradientSettings]) -> dict[str, dict]:
    return {f"{shots} shots": asdict(settings) for shots, settings in gradient.items()}
