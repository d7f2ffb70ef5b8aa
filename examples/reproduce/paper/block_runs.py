"""One training of the generator of last blocks and heads, as one file, and the trajectories that it learns from."""

import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from mcdi_hf.utils.files import write_file

from .blocks import BlockEpisodes, BlockGenerator, filled, optimise_blocks
from .generator import Batches, Setting, sample, scheduler_of, train
from .heads import Trajectories
from .runs import EPISODES, features_at, rounded, write_once


TASKS, ROWS, STEPS, AT_ONCE = 600, 48, 200, 250


def trajectories_path(output_dir: Path, shared_block: bool) -> Path:
    return output_dir / f"blocks-{'shared' if shared_block else 'own'}.safetensors"


def prepare_blocks(output_dir: Path, shared_block: bool) -> None:
    """Make and write the trajectories, unless an earlier run did."""
    torch.set_num_threads(1)
    path = trajectories_path(output_dir, shared_block)
    if not path.exists():
        maps = features_at(output_dir / "maps.safetensors").train
        tensors = {
            name: value.contiguous() for name, value in vars(optimise_blocks(maps, TASKS, shared_block)).items()
        }
        write_file(path, lambda stream: stream.write(save(tensors)))


@lru_cache(maxsize=1)
def read_blocks(path: Path) -> Trajectories:
    return Trajectories(**load_file(path))


def episodes_of_maps(maps: torch.Tensor) -> BlockEpisodes:
    """The test episodes that the heads have, of maps."""
    return BlockEpisodes.draw(maps, EPISODES, seed=2)


def run_blocks(setting: Setting, shared_block: bool, output_dir: Path) -> None:
    """Train a generator of blocks and measure it."""
    name = f"blocks-{'shared' if shared_block else 'own'}-{setting.name()}"
    write_once(output_dir, name, _train_and_measure, setting, shared_block, output_dir)


def _train_and_measure(setting: Setting, shared_block: bool, output_dir: Path) -> dict:
    maps, scheduler = features_at(output_dir / "maps.safetensors"), scheduler_of(setting)
    test = episodes_of_maps(maps.test)
    batches = Batches(maps.train, read_blocks(trajectories_path(output_dir, shared_block)), filled(), setting.coupled)
    torch.manual_seed(setting.seed)
    model, began = BlockGenerator(scheduler.alphas_cumprod), time.process_time()
    train(setting, batches, model, rows=ROWS)
    found = {"setting": asdict(setting), "shared block": shared_block, "seconds": time.process_time() - began}
    found["accuracy"] = {}
    for name, temperature in {"sampled": 1.0, "mean": 0.0}.items():
        parts = test.support.float().split(AT_ONCE)  # a chain of a thousand blocks would take gigabytes
        ends = [sample(model, scheduler, part, temperature=temperature, seed=i)[-1] for i, part in enumerate(parts)]
        weights = torch.cat(ends) * filled()
        found["accuracy"][name] = rounded(test.accuracies(weights))
        found["accuracy"][f"{name}, nearest shot"] = rounded(test.accuracies_of_features(weights))
    return found


def run_start(output_dir: Path) -> None:
    """What Gaussian blocks are worth that nothing has trained."""
    write_once(output_dir, "blocks-start", _measure_start, output_dir)


def _measure_start(output_dir: Path) -> dict:
    test = episodes_of_maps(features_at(output_dir / "maps.safetensors").test)
    weights = torch.randn(len(test.support), *filled().shape, generator=torch.Generator().manual_seed(0)) * filled()
    return {"accuracy": {"nearest shot": rounded(test.accuracies_of_features(weights))}}
