"""One training of the generator from its trajectories to what its heads are worth, as one file."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mcdi_hf import LocalConsistencyScheduler
from mcdi_hf.utils.files import write_file

from .conv4 import CHANNELS, Features
from .generator import Batches, HeadGenerator, Setting, sample, scheduler_of, train
from .heads import WAYS, Episodes, Trajectories, optimise, sharpness, unseen


TASKS, EPISODES, VALIDATION_EPISODES, PATHS = 10_000, 1_000, 200, 200
POINTS = 5  # of the curve of accuracy against time
STEPS_AT_USE = (10, 5, 2, 1)
SHARPNESS_REACH = 0.5
ONES = torch.ones(WAYS, CHANNELS + 1)


@lru_cache(maxsize=1)
def features_at(path: Path) -> Features:
    return Features(**load_file(path))


@lru_cache(maxsize=2)
def trajectories_of(path: Path, learning_rate: float, sam_rho: float, keep: int) -> Trajectories:
    return optimise(features_at(path).train, TASKS, learning_rate, sam_rho, keep)


def episodes_of(features: Features) -> tuple[Episodes, Episodes]:
    """Those of validation and those of the test, the same for everyone."""
    validation = Episodes.draw(features.validation, VALIDATION_EPISODES, seed=1)
    return validation, Episodes.draw(features.test, EPISODES, seed=2)


def write_once(output_dir: Path, name: str, measure: Callable[..., dict], *arguments: Any) -> None:
    """Write what `measure` finds, on one thread, as one file; what an earlier run wrote is left as it is."""
    torch.set_num_threads(1)
    path = output_dir / "runs" / f"{name}.json"
    if not path.exists():
        found = json.dumps(measure(*arguments))
        write_file(path, lambda stream: stream.write(found.encode()))


def run(setting: Setting, output_dir: Path) -> None:
    """Train a generator of heads and measure it."""
    write_once(output_dir, setting.name(), _train_and_measure, setting, output_dir)


def _train_and_measure(setting: Setting, output_dir: Path) -> dict:
    source = output_dir / "features.safetensors"
    features = features_at(source)
    validation, test = episodes_of(features)
    trajectories = trajectories_of(source, setting.learning_rate, setting.sam_rho, setting.num_segments)
    torch.manual_seed(setting.seed)
    model, batches = HeadGenerator(), Batches(features.train, trajectories, ONES, setting.coupled)
    scheduler, curve, began, judging = scheduler_of(setting), [], time.process_time(), 0.0

    def judge(step: int) -> None:
        nonlocal judging
        if step * POINTS % setting.steps:
            return
        reached = time.process_time()
        heads = sample(model, scheduler, validation.support)[-1]
        curve.append([step, reached - began - judging, float(validation.accuracies(heads).mean())])
        judging += time.process_time() - reached

    train(setting, batches, model, judge)
    model.denoiser.save_pretrained(output_dir / "runs" / setting.name())
    return {
        "setting": asdict(setting),
        "curve": curve,
        "accuracy": accuracies(setting, model, test),
        "boundaries": boundary_distances(setting, model, features, {"sampled": {}, "mean": {"temperature": 0.0}}),
        "sharpness": sharpnesses(setting, model, features, trajectories),
    }


def load(setting: Setting, output_dir: Path) -> HeadGenerator:
    """The generator that a run left."""
    model = HeadGenerator()
    model.denoiser = type(model.denoiser).from_pretrained(output_dir / "runs" / setting.name())
    return model.eval()


def accuracies(setting: Setting, model: HeadGenerator, test: Episodes) -> dict[str, list[float]]:
    """Way to sample -> an accuracy for each test episode."""
    scheduler = scheduler_of(setting)
    ways = {"sampled": {}, "mean": {"temperature": 0.0}, "5 steps": {"steps": 5}}
    if usual := setting == Setting(setting.objective, setting.level, setting.seed, setting.coupled):
        ways |= {"local noise": {"local_noise": LocalConsistencyScheduler()}}
    if usual and setting.seed < 2:
        ways |= {f"{steps} steps": {"steps": steps} for steps in STEPS_AT_USE}
        ways |= {f"{steps} steps, mean": {"steps": steps, "temperature": 0.0} for steps in STEPS_AT_USE}
    found = {}
    for name, how in ways.items():
        heads = sample(model, scheduler, test.support, **how)[-1]
        found[name] = rounded(test.accuracies(heads))
    if usual:
        heads = sample(model, scheduler, test.support.roll(1, dims=0))[-1]  # of another task's support
        found["another task's support"] = rounded(test.accuracies(heads))
    return found


def rounded(accuracies: torch.Tensor) -> list[float]:
    """As many digits as files keep of them."""
    return [round(value, 4) for value in accuracies.tolist()]


def run_ddim(setting: Setting, output_dir: Path) -> None:
    """What a trained generator is worth by DDIM, which keeps the noise that it starts from, where DDPM replaces it."""
    write_once(output_dir, f"ddim-{setting.name()}", _measure_ddim, setting, output_dir)


def _measure_ddim(setting: Setting, output_dir: Path) -> dict:
    features, model = features_at(output_dir / "features.safetensors"), load(setting, output_dir)
    test, how = episodes_of(features)[1], {"eta": 0.0}
    heads = sample(model, scheduler_of(setting), test.support, **how)[-1]
    boundaries = boundary_distances(setting, model, features, {"DDIM": how})
    return {"accuracy": {"DDIM": rounded(test.accuracies(heads))}, "boundaries": boundaries}


def boundary_distances(
    setting: Setting, model: HeadGenerator, features: Features, ways: dict[str, dict]
) -> dict[str, list[float]]:
    """How far the chain from a trajectory's own start is from its local targets where it leaves a segment, per number:
    as a root mean square for each of three targets, for each of some `ways` to sample. Beside it that of the start, and
    of a second trajectory of the same task, from another start."""
    own, other = (
        optimise(features.validation, PATHS, setting.learning_rate, setting.sam_rho, 3, seed=3, start_seed=seed)
        for seed in (0, 1)
    )
    scheduler = scheduler_of(setting)
    segments = LocalConsistencyScheduler(num_train_timesteps=len(scheduler))
    stops = len(scheduler) - segments.segment_boundaries
    support = features.validation[own.classes, 0, 0]
    found = {"start": own.start.unsqueeze(1).expand_as(own.targets), "second trajectory": other.targets}
    for name, how in ways.items():
        chain = sample(model, scheduler, support, start=own.start, **how)
        found[name] = chain[stops].transpose(0, 1)
    return {
        name: (states - own.targets).square().mean(dim=(0, 2, 3)).sqrt().tolist() for name, states in found.items()
    }


def sharpnesses(
    setting: Setting, model: HeadGenerator, features: Features, trajectories: Trajectories
) -> dict[str, float]:
    """The mean sharpness of targets and of what is generated, on unseen drawers, and how good the targets are."""
    classes, targets = trajectories.classes[:PATHS], trajectories.targets[:PATHS, -1]
    rows, labels = unseen(features.train, classes)
    found = {"targets": float(sharpness(targets, rows, labels, SHARPNESS_REACH).mean())}
    judged = Episodes(rows[:, ::5], rows, labels)
    found["accuracy of targets"] = float(judged.accuracies(targets).mean())
    own = optimise(features.validation, PATHS, setting.learning_rate, setting.sam_rho, 1, seed=3)
    rows, labels = unseen(features.validation, own.classes)
    heads = sample(model, scheduler_of(setting), features.validation[own.classes, 0, 0])[-1]
    return found | {"generated": float(sharpness(heads, rows, labels, SHARPNESS_REACH).mean())}
