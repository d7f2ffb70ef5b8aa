"""Every way to an adapter on the tasks of one split, as functions from tasks to accuracies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark_fold import Fold, settings_of
from benchmark_seal import Sealed
from benchmark_ways import (
    CEILING,
    FROZEN,
    GRADIENT,
    GRADIENT_TIME,
    LOGISTIC,
    MC_DI,
    MEAN,
    MIXED,
    MV_DI,
    NEAREST,
    NOISE,
    NOISED,
    ONE_DRAW,
    PCA_SAMPLE,
    REPTILE,
    SHARED,
    SHUFFLED,
    SINGLE_LEVEL,
    TW_DI,
)
from data import installed_backbone
from gradient_rival import GradientSettings, all_data_tasks, gradient_accuracies
from mixing_rival import mixed_adapters
from setfit_rival import SetFitRival

from mcdi_hf import Task
from mcdi_hf.evaluation.controls import noised, pca_samples
from mcdi_hf.training.validation import adapter_accuracies, free_accuracies, generated_accuracies, support_texts
from mcdi_hf.evaluation.logistic import logistic_accuracies


Way = Callable[[list[Task]], list[float]]

ABLATIONS = [SINGLE_LEVEL, MV_DI, TW_DI]
CANDIDATES = 8
LORAHUB_ADAPTERS = 20  # that a task mixes, as in the paper


def choice_name(way: str, shots: int | None) -> str:
    return way if shots is None else f"{way}, {shots}-shot"


class Contest:
    """What competes on the tasks of one split of a fold.

    Args:
        fold (`Fold`): The data, the generators and what was trained beside them.
        split (`str`): `"validation"` or `"test"`.
        sealed (`Sealed`): Where choices are made, on validation, and looked up.
    """

    def __init__(self, fold: Fold, split: str, sealed: Sealed) -> None:
        self.fold, self.split, self.sealed, self.sizes = fold, split, sealed, fold.sizes
        self.stacked, self.examples = fold.stacked, fold.split(split).examples
        self.features = fold.split(split).features  # under the mean adapter: what the generator sees
        self.scale = fold.codec.config.imprint_scale
        self.frozen = fold.plain_features(fold.family.frozen, split)
        self._features: dict[str, torch.Tensor] = {}
        self.noise = fold.noise_features(split)
        self.setfit = None
        if not fold.family.pipe.backbone.reads_images and fold.sizes.setfit_episodes:
            self.setfit = SetFitRival(str(fold.generator.backbone or installed_backbone()))

    def chosen(self, name: str, shots: int | None = None) -> Any:
        """What validation chose, for a number of shots where it depends on them."""
        return self.sealed.choices[choice_name(name, shots)]["best"]

    def shared(self, seed: int) -> torch.Tensor:
        """What the head reads of every example under the one shared adapter."""
        return self._once(f"shared {seed}", lambda: self.fold.plain_features(self.fold.shared[seed][0], self.split))

    def reptile(self, seed: int) -> torch.Tensor:
        """The same under REPTILE's start."""
        return self._once(f"REPTILE {seed}", lambda: self.fold.reptile[seed].features(self.examples))

    def pooled(self) -> torch.Tensor:
        """The same of the frozen backbone, under the pooling that validation chose."""
        pooling = self.chosen(FROZEN)
        if pooling == self.fold.family.pipe.backbone.pooling:
            return self.frozen
        return self._once(f"pooled {pooling}", lambda: self.fold.pooled_features(pooling, self.split))

    def _once(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._features:
            self._features[name] = make()
        return self._features[name]

    def fast(self, seed: int, shots: int) -> dict[str, Way]:
        """Ways that are quick to judge, on all tasks."""
        fold, stacked = self.fold, self.stacked
        mc = fold.pipeline("Mc-Di", seed)
        made = partial(self.generated, seed=seed)
        pooled, trained = self.pooled(), fold.generator.trained()
        own = partial(adapter_accuracies, stacked, examples=self.examples, scale=self.scale)
        return {
            FROZEN: partial(free_accuracies, stacked, pooled, fold.frozen_scale),
            LOGISTIC: partial(logistic_accuracies, pooled, penalty=self.chosen(LOGISTIC, shots)),
            SHARED: partial(free_accuracies, stacked, self.shared(seed), fold.shared[seed][1]),
            MEAN: partial(free_accuracies, stacked, self.features, self.scale),
            NEAREST: lambda tasks: own(tensors=self.nearest(tasks), tasks=tasks),
            **{name: partial(made, fold.pipeline(name, seed)) for name in ABLATIONS if (name, seed) in trained},
            ONE_DRAW: partial(made, mc, num_candidates=1),
            MC_DI: partial(made, mc),
            SHUFFLED: lambda tasks: made(mc, tasks, conditions=[*tasks[1:], tasks[0]]),
            NOISE: partial(made, mc, condition_features=self.noise),
            NOISED: lambda tasks: own(tensors=self.noised(tasks, self.chosen(NOISED), seed), tasks=tasks),
            PCA_SAMPLE: lambda tasks: own(tensors=self.sampled(len(tasks), seed), tasks=tasks),
        }

    def slow(self, seed: int, shots: int) -> dict[str, Way]:
        """Ways that train for each task."""
        reptile = self.fold.reptile[seed]
        steps = self.chosen(REPTILE, shots)
        return {
            MIXED: partial(self.mixed, seed=seed),
            REPTILE: partial(reptile.accuracies, self.examples, self.reptile(seed), num_steps=steps),
            GRADIENT: partial(self.gradient, settings_of(self.chosen(GRADIENT, shots)), seed=seed),
            GRADIENT_TIME: partial(self.gradient, settings_of(self.chosen(GRADIENT_TIME, shots)), seed=seed),
            CEILING: partial(self.ceiling, seed=seed),
        }

    def generated(self, pipe, tasks: list[Task], seed: int, num_candidates: int = CANDIDATES, **shown) -> list[float]:
        noise = torch.Generator().manual_seed(seed)  # the same whatever the generator is shown
        return generated_accuracies(
            pipe, self.examples, self.features, tasks, num_candidates=num_candidates, generator=noise, **shown
        )

    def indices(self, tasks: list[Task]) -> torch.Tensor:
        """For each task the training adapter whose examples lie nearest to its support."""
        rows = [torch.tensor([row for members in task.support for row in members]) for task in tasks]
        places = torch.stack([self.features[own].mean(dim=0) for own in rows])
        return torch.nn.functional.cosine_similarity(places[:, None], self.fold.places[None], dim=-1).argmax(dim=1)

    def nearest(self, tasks: list[Task]) -> dict[str, torch.Tensor]:
        indices = self.indices(tasks)
        return {key: value[indices] for key, value in self.fold.adapters.items()}

    def noised(self, tasks: list[Task], relative_scale: float, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return noised(self.nearest(tasks), self.fold.adapters, relative_scale, generator)

    def sampled(self, count: int, seed: int) -> dict[str, torch.Tensor]:
        return pca_samples(self.fold.adapters, count, None, torch.Generator().manual_seed(seed))

    def mixed(self, tasks: list[Task], seed: int) -> list[float]:
        adapters, scale = self.fold.adapters, self.fold.frozen_scale
        sizes = min(LORAHUB_ADAPTERS, len(self.fold.places)), self.sizes.lorahub_evaluations
        tensors = mixed_adapters(self.stacked, adapters, self.examples, tasks, scale, *sizes, seed)
        return adapter_accuracies(self.stacked, tensors, self.examples, tasks, scale)

    def gradient(self, settings: GradientSettings, tasks: list[Task], seed: int) -> list[float]:
        scale = self.fold.frozen_scale
        return gradient_accuracies(self.stacked, self.examples, self.frozen, tasks, settings, scale, seed)

    def ceiling(self, tasks: list[Task], seed: int) -> list[float]:
        """LoRA on all the examples of each task's classes but its query."""
        _, rows = self.fold.family.splits[self.split]
        tasks = all_data_tasks(tasks, rows[0], self.sizes.ceiling_examples)
        rate = max(self.sizes.gradient_learning_rates)
        return self.gradient(GradientSettings("imprinted", self.sizes.ceiling_steps, rate), tasks, seed)

    def setfit_accuracies(self, tasks: list[Task]) -> list[float]:
        rows = sorted({row for task in tasks for members in task.support + task.query for row in members})
        texts = dict(zip(rows, self.fold.inputs(self.split, rows)))
        found = []
        for task in tasks:
            model = self.setfit.fit(support_texts(texts, task))
            queries = [texts[row] for members in task.query for row in members]
            labels = torch.tensor([label for label, members in enumerate(task.query) for _ in members])
            found.append(self.setfit.accuracy(model, queries, labels))
        return found
