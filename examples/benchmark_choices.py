"""What rivals and controls may choose, on validation tasks."""

from collections.abc import Callable
from functools import partial

import numpy as np
from benchmark_contest import Contest, Way, choice_name
from benchmark_fold import asked_once, best_of, gradient_grid, seconds_of, settings_of, shots_of
from benchmark_ways import FROZEN, GRADIENT, GRADIENT_TIME, LOGISTIC, NOISED, REPTILE

from mcdi_hf import Task
from mcdi_hf.training.validation import adapter_accuracies, free_accuracies
from mcdi_hf.evaluation.logistic import logistic_accuracies


POOLINGS = ["mean", "default"]  # of a text model
PENALTIES = [0.1, 1.0, 10.0, 100.0]  # of logistic regression
REPTILE_STEPS = [1, 3, 10, 30]
NOISE_SCALES = [0.1, 0.3, 1.0, 3.0]


class Choices:
    """Makes the choices of a table on the validation tasks of its first fold.

    Args:
        contest (`Contest`): Of the validation split.
    """

    def __init__(self, contest: Contest) -> None:
        self.contest, self.fold, self.sealed = contest, contest.fold, contest.sealed
        self.seed = self.fold.generator.seeds[0]

    def make(self) -> None:
        """Everything that a rival or a control may choose; each tries at most four options."""
        fold, contest = self.fold, self.contest
        own = fold.family.pipe.backbone
        features = {own.pooling: contest.frozen}
        if not own.reads_images:
            features |= {one: fold.pooled_features(one, "validation") for one in POOLINGS if one != own.pooling}
        self._choose(
            FROZEN,
            list(features),
            lambda one: partial(free_accuracies, contest.stacked, features[one], fold.frozen_scale),
        )
        self._choose(NOISED, NOISE_SCALES, self._noised)
        for shots in sorted({shots_of(kind) for kind in fold.table["kinds"]}):
            grid = gradient_grid(self.fold.sizes.gradient_steps, self.fold.sizes.gradient_learning_rates)
            self._choose(LOGISTIC, PENALTIES, self._logistic, shots)
            self._choose(GRADIENT, grid, self._gradient, shots)
            steps = self.sealed.choose(
                choice_name("steps in the time of a generation", shots), partial(self._equal_steps, shots)
            )
            grid = gradient_grid((steps,), self.fold.sizes.gradient_learning_rates)
            self._choose(GRADIENT_TIME, grid, self._gradient, shots)
            self._choose(REPTILE, REPTILE_STEPS, self._reptile, shots)

    def _choose(self, name: str, options: list, way: Callable[..., Way], shots: int | None = None) -> None:
        self.sealed.choose(
            choice_name(name, shots), lambda: best_of(options, lambda option: self._score(way(option), shots))
        )

    def _score(self, way: Way, shots: int | None) -> float:
        """Mean accuracy over the kinds of validation tasks of so many shots, or over all kinds."""
        found = []
        for kind in self.fold.family.values["validation_kinds"]:
            if shots is None or shots_of(kind) == shots:
                found += way(self._tasks(kind))
        return float(np.mean(found))

    def _tasks(self, kind: str) -> list[Task]:
        return self.fold.family.tasks("validation", kind, 100, self.fold.sizes.validation_episodes)

    def _noised(self, scale: float) -> Way:
        contest = self.contest

        def way(tasks: list[Task]) -> list[float]:
            tensors = contest.noised(tasks, scale, self.seed)
            return adapter_accuracies(contest.stacked, tensors, contest.examples, tasks, contest.scale)

        return way

    def _logistic(self, penalty: float) -> Way:
        return partial(logistic_accuracies, self.contest.frozen, penalty=penalty)

    def _gradient(self, option: list) -> Way:
        return partial(self.contest.gradient, settings_of(option), seed=self.seed)

    def _reptile(self, steps: int) -> Way:
        contest = self.contest
        return partial(
            self.fold.reptile[self.seed].accuracies, contest.examples, contest.reptile(self.seed), num_steps=steps
        )

    def _equal_steps(self, shots: int) -> int:
        """How many steps of gradient LoRA take as long as one generation: at least one."""
        kind = next(kind for kind in self.fold.family.values["validation_kinds"] if shots_of(kind) == shots)
        tasks = [asked_once(self._tasks(kind)[0])]
        contest, steps = self.contest, 5
        pipe = self.fold.pipeline("Mc-Di", self.seed)
        generating = seconds_of(partial(contest.generated, pipe, tasks, self.seed), self.fold.sizes.timings)
        training = seconds_of(
            partial(contest.gradient, settings_of([steps, 1e-3]), tasks, self.seed), self.fold.sizes.timings
        )
        return max(1, round(generating / (training / steps)))
