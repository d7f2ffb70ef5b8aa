"""One table's data and generators: what is trained on the training tasks, and what validation chooses."""

import argparse
import itertools
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from data import inputs_of, installed_backbone
from families import Family, shared_adapter
from generators import Generator
from gradient_rival import GradientSettings
from peft import LoraConfig
from PIL import Image
from reptile_rival import AdapterReptile
from training_data import Split

from mcdi_hf import EpisodeSampler, FrozenBackbone, MCDiPipeline, StackedLora, Task
from mcdi_hf.adapters.layout import AdapterLayout
from mcdi_hf.trajectories.dataset import final_adapters
from mcdi_hf.trajectories.shared import imprint_scale_for, initial_adapter


@dataclass(frozen=True)
class Sizes:
    """How much of everything a family's benchmark takes.

    Attributes:
        episodes (`int`): Test tasks of a kind and a seed.
        slow_episodes (`int`): Of them for ways that train for each task, fewer where a task has many examples.
        setfit_episodes (`int`): Of them for SetFit, and only where a task has at most `setfit_examples`.
        setfit_examples (`int`): See there.
        validation_episodes (`int`): Validation tasks of a kind that a setting is tried on.
        shared_steps (`int`): Episodes that the one shared adapter is trained on.
        reptile_steps (`int`): Outer steps of REPTILE on the adapter.
        gradient_steps (`list[int]`), gradient_learning_rates (`list[float]`): The settings of gradient LoRA to try.
        lorahub_evaluations (`int`): Mixes that LoraHub tries for a task.
        ceiling_steps (`int`): Steps of LoRA on all data.
        ceiling_examples (`int`): The most examples of a class that it sees.
        timings (`int`): Repeats of what is timed.
        inference_steps (`list[int]`): Numbers of the generator's steps in the picture of steps.
        chain_examples (`int`): Of a class, that the optimiser sees in the picture of the chain.
        grid (`int`): Points along a side of that picture.
    """

    episodes: int = 30
    slow_episodes: int = 8
    setfit_episodes: int = 2
    setfit_examples: int = 30
    validation_episodes: int = 8
    shared_steps: int = 100
    reptile_steps: int = 15
    gradient_steps: tuple[int, ...] = (10, 30)
    gradient_learning_rates: tuple[float, ...] = (1e-3, 5e-3)
    lorahub_evaluations: int = 40
    ceiling_steps: int = 40
    ceiling_examples: int = 200
    timings: int = 3
    inference_steps: tuple[int, ...] = (1, 2, 4, 8, 20)
    chain_examples: int = 15
    grid: int = 13


def shots_of(kind: str) -> int:
    return int(kind.split("x")[-1])


def random_inputs(like: Any, count: int) -> list:
    """Inputs that say nothing: letters drawn at random for a text or a pair, pixels drawn at random for an image."""
    random = np.random.default_rng(0)
    if isinstance(like, Image.Image):
        shape = np.asarray(like).shape
        return [Image.fromarray(random.integers(256, size=shape, dtype=np.uint8)) for _ in range(count)]
    letters = np.array(list(string.ascii_lowercase + "    "))
    return ["".join(random.choice(letters, size=60)) for _ in range(count)]


class Fold:
    """The generators of one fold on the data of one table.

    Args:
        table (`dict`): Of a family's `tables`.
        name (`str`): The fold.
        generator (`Generator`): What is judged.
        sizes (`Sizes`): See there.
        args (`argparse.Namespace`): The command's `data_root`, `runs_root` and `cache_dir`.
    """

    def __init__(self, table: dict, name: str, generator: Generator, sizes: Sizes, args: argparse.Namespace) -> None:
        self.table, self.name, self.generator, self.sizes, self.args = table, name, generator, sizes, args
        own = {
            "name": f"{table['name']}, {name}",
            "pipeline": str(generator.pipeline("Mc-Di", generator.seeds[0])),
            "trajectories": str(generator.folder.absolute() / "trajectories"),
            "validation_domains": generator.validation_domains,
            "test_domains": table.get("test_domains", generator.test_domains),
            "validation_kinds": table.get("validation_kinds", table["kinds"]),
        }
        if generator.backbone is not None:
            own["backbone"] = str(generator.backbone.absolute())
        self.family = Family({**table, **own}, args)
        self.stacked, self.codec = self.family.stacked, self.family.codec
        ends = final_adapters(self.family.trajectories, self.codec.layout)
        self.adapters = {key: torch.cat([end[key] for end in ends]) for key in self.codec.layout.lora_shapes}
        train, rows = self.family.training()
        self.frozen_scale = imprint_scale_for(self.stacked, self.family.frozen, train)
        self.places = self.family.places(train)
        self.shared, self.reptile = {}, {}
        for seed in generator.seeds:
            ways = tuple(self.family.description["tasks"]["ways"])
            sampler = EpisodeSampler(rows, ways, (1, 5), 5, seed)
            path = generator.folder / f"shared-{sizes.shared_steps}-{seed}.safetensors"
            self.shared[seed] = shared_adapter(
                path, self.stacked, train, sampler, sizes.shared_steps, seed, generator.name
            )
            self.reptile[seed] = self._reptile(train, EpisodeSampler(rows, ways, (5, 5), 1, seed), seed)
        self._pipelines = {}

    def pipeline(self, objective: str, seed: int) -> MCDiPipeline:
        """A trained generator, on the one backbone."""
        if (objective, seed) not in self._pipelines:
            pipe = MCDiPipeline.from_pretrained(self.generator.pipeline(objective, seed))
            pipe.set_progress_bar_config(disable=True)
            pipe.backbone = self.family.pipe.backbone
            self._pipelines[objective, seed] = pipe
        return self._pipelines[objective, seed]

    def split(self, name: str) -> Split:
        return self.family.splits[name][0]

    def inputs(self, split: str, rows: list[int]) -> list:
        """Texts, pairs of texts or images of some rows."""
        return inputs_of(self.family.tables[split].select(rows))

    def plain_features(self, tensors: dict[str, torch.Tensor], split: str) -> torch.Tensor:
        return self.stacked.features_of_all(tensors, self.split(split).examples)

    def pooled_features(self, pooling: str, split: str) -> torch.Tensor:
        """What the head reads of the frozen backbone under another pooling than its own: `(rows, feature_dim)`."""
        own = self.family.pipe.backbone
        folder = str(self.generator.backbone or installed_backbone())
        backbone = FrozenBackbone.from_pretrained(folder, pooling, max_length=own.max_length, dtype=torch.float32)
        # No head is needed to see features, and under another pooling the model's may have no bias.
        config = self.codec.config.lora_config | {"task_type": None, "modules_to_save": None}
        layout = AdapterLayout.from_model(backbone.model, LoraConfig(**config), backbone.head_name)
        stacked = StackedLora(backbone, layout)
        examples = stacked.encode(inputs_of(self.family.tables[split]), cache_dir=self.args.cache_dir)
        return stacked.features_of_all(initial_adapter(layout), examples)

    def noise_features(self, split: str) -> torch.Tensor:
        """For every row of a split the features of an input that says nothing."""
        count = 64
        inputs = random_inputs(self.inputs(split, [0])[0], count)
        features = self.stacked.features_of_all(self.codec.mean_adapter(), self.stacked.encode(inputs))
        rows = np.random.default_rng(0).integers(count, size=len(self.split(split).examples))
        return features[torch.from_numpy(rows)]

    def _reptile(self, train, sampler: EpisodeSampler, seed: int) -> AdapterReptile:
        steps = self.sizes.reptile_steps
        path = self.generator.folder / f"reptile-{steps}-{seed}.safetensors"
        if not path.exists():
            AdapterReptile.train(self.stacked, train, sampler, steps, seed, self.frozen_scale).save(path)
        return AdapterReptile.load(self.stacked, path)


def best_of(options: list, score: Callable[[Any], float]) -> dict:
    """Try every option on validation tasks; JSON values of the best one and of all that was tried."""
    tried = [{"option": option, "accuracy": score(option)} for option in options]
    return {"best": max(tried, key=lambda one: one["accuracy"])["option"], "tried": tried}


def gradient_grid(steps: tuple[int, ...], learning_rates: tuple[float, ...]) -> list[list]:
    return [[count, rate] for count, rate in itertools.product(steps, learning_rates)]


def settings_of(option: list) -> GradientSettings:
    return GradientSettings("imprinted", *option)


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def asked_once(task: Task) -> Task:
    """The same task with one query a class, for timing what comes before the query."""
    return replace(task, query=tuple(members[:1] for members in task.query))
