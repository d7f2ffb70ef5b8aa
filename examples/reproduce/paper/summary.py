"""What all runs say together: means, paired differences and what a generation takes, as one JSON object."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from mcdi_hf.training.objective import OBJECTIVES

from .conv4 import CHANNELS
from .generator import HeadGenerator, Setting, sample, scheduler_of
from .heads import WAYS
from .rivals import Reptile, adapt, untrained


NAMES = {"mc": "Mc-Di", "mv": "Mv-Di", "tw": "Tw-Di", "mv_times": "Mv-Di on Mc-Di's timesteps"}
LEVELS = {"bi": 3, "single": 4}  # how many seeds each has
PAIRS = [("mc", "mv"), ("mc", "tw"), ("mv", "tw"), ("mv_times", "mv")]
# Setting -> its values and the objectives that are trained with each, two seeds on one level.
SWEEPS = {
    "learning_rate": ((0.01, 0.05, 0.2, 0.5), ("mc", "mv", "tw")),
    "sam_rho": ((0.0, 0.05, 0.5), ("mc", "mv")),
    "num_segments": ((2, 3, 5, 10), ("mc",)),
    "num_train_timesteps": ((5, 10, 20, 50), ("mc", "mv")),
}
SWEEP_SEEDS = 2
WAYS_TO_SAMPLE = ("sampled", "local noise", "5 steps", "mean")
REPEATS = 21


class Runs:
    """The files of all runs, by what they measured."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "runs"

    def read(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def of(self, *settings: Setting) -> list[dict]:
        return [self.read(setting.name()) for setting in settings]


def accuracy(runs: Iterable[dict], way: str) -> np.ndarray:
    """Seeds by episodes."""
    return np.array([run["accuracy"][way] for run in runs])


def estimate(values: np.ndarray) -> dict[str, float]:
    """The mean over seeds and episodes in percent, half the 95 % interval over episodes (of their means over seeds), and
    the standard deviation of the seeds' means."""
    episodes = values.mean(axis=0)
    half = 1.96 * episodes.std(ddof=1) / math.sqrt(len(episodes))
    seeds = values.mean(axis=1).std(ddof=1) if len(values) > 1 else 0.0
    return {"mean": 100 * episodes.mean(), "half": 100 * half, "seeds": 100 * seeds}


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """The same of a paired difference, and in how many seeds it is above zero."""
    above = int((first.mean(axis=1) > second.mean(axis=1)).sum())
    return estimate(first - second) | {"above": above, "count": len(first)}


def order(runs: Runs) -> dict:
    """Every objective on either level: accuracies by way to sample, differences, and the curve of training."""
    found = {}
    for level, seeds in LEVELS.items():
        own = {one: runs.of(*(Setting(one, level, seed) for seed in range(seeds))) for one in NAMES}
        found[level] = {
            "accuracy": {
                one: {way: estimate(accuracy(some, way)) for way in (*WAYS_TO_SAMPLE, "another task's support")}
                for one, some in own.items()
            },
            "difference": {
                f"{one} - {other}": {
                    way: difference(accuracy(own[one], way), accuracy(own[other], way)) for way in WAYS_TO_SAMPLE
                }
                for one, other in PAIRS
            },
            "curve": {
                one: [
                    {
                        "step": point[0][0],
                        "seconds": mean(p[1] for p in point),
                        "accuracy": [100 * p[2] for p in point],
                    }
                    for point in zip(*(run["curve"] for run in some))
                ]
                for one, some in own.items()
            },
        }
    return found


def coupling(runs: Runs) -> dict:
    """Noise that is a trajectory's own start beside noise of its own, on one level, by the way to sample."""
    found = {}
    for one in OBJECTIVES:
        free, coupled = (
            [_with_ddim(runs, Setting(one, seed=seed, coupled=coupled)) for seed in range(3)]
            for coupled in (False, True)
        )
        found[one] = {
            way: {
                "free": estimate(accuracy(free, way)),
                "coupled": estimate(accuracy(coupled, way)),
                "difference": difference(accuracy(coupled, way), accuracy(free, way)),
            }
            for way in ("sampled", "mean", "DDIM")
        }
        found[one]["boundaries"] = {
            name: {
                way: np.mean([run["boundaries"][way] for run in some], axis=0).tolist()
                for way in some[0]["boundaries"]
            }
            for name, some in {"free": free, "coupled": coupled}.items()
        }
    return found


def _with_ddim(runs: Runs, setting: Setting) -> dict:
    usual, ddim = runs.read(setting.name()), runs.read(f"ddim-{setting.name()}")
    return {part: usual[part] | ddim[part] for part in ("accuracy", "boundaries")}


def sweep(runs: Runs, field: str) -> list[dict]:
    """A row for each value of a setting: for each objective the accuracy by way to sample, and the sharpness."""
    rows, (values, objectives) = [], SWEEPS[field]
    for value in values:
        row = {"value": value}
        for one in objectives:
            some = runs.of(*(Setting(one, seed=seed, **{field: value}) for seed in range(SWEEP_SEEDS)))
            row[one] = {way: estimate(accuracy(some, way)) for way in ("sampled", "5 steps", "mean")}
            row[one]["sharpness"] = {
                name: mean(run["sharpness"][name] for run in some) for name in some[0]["sharpness"]
            }
        rows.append(row)
    return rows


def steps_at_use(runs: Runs) -> list[dict]:
    """Of two seeds of the single level, by the number of sampling steps."""
    rows = []
    for steps in (20, 10, 5, 2, 1):
        row = {"steps": steps}
        for one in OBJECTIVES:
            some = runs.of(*(Setting(one, seed=seed) for seed in range(2)))
            sampled, means = ("sampled", "mean") if steps == 20 else (f"{steps} steps", f"{steps} steps, mean")
            row[one] = {"sampled": estimate(accuracy(some, sampled)), "mean": estimate(accuracy(some, means))}
        rows.append(row)
    return rows


def blocks(runs: Runs, steps: int) -> dict:
    """Last blocks with heads: all from one Gaussian block, three seeds, and each from its own, one seed of Mc-Di."""

    def read(kind: str, setting: Setting) -> dict:
        return runs.read(f"blocks-{kind}-{setting.name()}")

    shared = {one: [read("shared", Setting(one, seed=seed, steps=steps)) for seed in range(3)] for one in OBJECTIVES}
    own = {
        "own": [read("own", Setting("mc", steps=steps))],
        "own, coupled": [read("own", Setting("mc", coupled=True, steps=steps))],
    }
    return {
        "start": estimate(np.array([runs.read("blocks-start")["accuracy"]["nearest shot"]])),
        "accuracy": {
            name: {way: estimate(accuracy(some, way)) for way in some[0]["accuracy"]}
            for name, some in (shared | own).items()
        },
        "difference": {
            f"{one} - {other}": {
                way: difference(accuracy(shared[one], way), accuracy(shared[other], way))
                for way in ("sampled", "mean")
            }
            for one, other in PAIRS[:3]
        },
    }


def rivals(runs: Runs, reptiles: list[Reptile]) -> dict:
    """What needs no generator; of REPTILE for each part the inner learning rate that validation likes best."""
    found = {name: estimate(np.array([values])) for name, values in runs.read("frozen")["accuracy"].items()}
    for part in ("head", "block", "whole"):
        tried = [runs.read(one.name()) for one in reptiles if one.part == part]
        best = max(tried, key=lambda run: max(run["validation"].values()))
        found[f"REPTILE, {part}"] = estimate(np.array([best["accuracy"]])) | {
            "steps at use": best["steps at use"],
            "learning rate": best["setting"]["learning_rate"],
        }
    return found


def latency(steps: dict[str, int]) -> dict[str, float]:
    """Milliseconds for one task on one core, the median of 21: a generated head by the number of sampling steps, and
    REPTILE's gradient steps by the part of the network."""
    torch.set_num_threads(1)
    model, scheduler, support = HeadGenerator(), scheduler_of(Setting()), torch.randn(1, WAYS, CHANNELS)
    found = {
        f"generated head, {count} steps": _milliseconds(
            lambda count=count: sample(model, scheduler, support, steps=count)
        )
        for count in (20, 5, 1)
    }
    inputs = {"head": (CHANNELS,), "block": (9 * CHANNELS,), "whole": (1, 28, 28)}
    for part, shape in inputs.items():
        network, shots = untrained(part), torch.randn(WAYS, *shape)
        name = f"REPTILE, {part}, {steps[part]} gradient steps"
        found[name] = _milliseconds(lambda: adapt(network, shots, 0.1, steps[part]))
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def summary(output_dir: Path, reptiles: list[Reptile], block_steps: int) -> dict:
    """All of it."""
    runs = Runs(output_dir)
    found = {"rivals": rivals(runs, reptiles), "order": order(runs), "coupling": coupling(runs)}
    found |= {field: sweep(runs, field) for field in SWEEPS}
    found["steps"], found["blocks"] = steps_at_use(runs), blocks(runs, block_steps)
    steps = {part: found["rivals"][f"REPTILE, {part}"]["steps at use"] for part in ("head", "block", "whole")}
    return found | {"milliseconds": latency(steps)}
