"""The benchmark's modules, and one experiment at its smoke size, made once."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmark"))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """The arguments of a smoke run that has ended, with its `results`."""
    from run import Experiment
    from smoke import write_smoke

    folder = tmp_path_factory.mktemp("data") / "smoke"  # where `--smoke --data_root data` looks
    roots = {"data_root": folder, "backbones_root": folder, "runs_root": folder / "runs", "cache_dir": None}
    args = argparse.Namespace(config=write_smoke(folder), **roots)
    args.results = json.loads(json.dumps(Experiment(args.config, args).run()))
    return args


@pytest.fixture
def fold(smoke: argparse.Namespace):
    """The smoke run's fold with random training adapters and a generator of random weights: everything that could
    matter does."""
    from fold import Fold
    from run import Experiment
    from tiny import random_adapters, seeded

    from mcdi_hf.adapters.head import RidgeHead

    experiment = Experiment(smoke.config, smoke)
    own = Fold(experiment.generators[0], experiment.config, experiment.sizes, smoke)
    pipe, noise = own.pipeline("Mc-Di", 0), seeded(1)
    pipe.codec.std.fill_(0.5)
    for parameter in (*pipe.denoiser.parameters(), *pipe.task_encoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=noise)
    shared = random_adapters(own.codec.layout, 1, seed=2)
    shared = {key: shared[key] for key in own.codec.layout.lora_shapes}
    pipe.codec.set_shared_adapter(shared, RidgeHead(2.0, -3.0, 0.2, own.codec.head.feature_norm))
    coefficients = torch.randn(6, *own.codec.filled.shape, generator=noise)
    training = own.training
    supports = [*training.supports, *training.supports][:6]
    own._made["training"] = replace(training, coefficients=coefficients, supports=supports)
    return own
