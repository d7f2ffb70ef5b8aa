"""The frozen backbone with the head in closed form, or a verbalizer: what is free without any training."""

from typing import Any

from fold import Fold
from splits import Split

from mcdi_hf import Task

from .base import Method


class Frozen(Method):
    """Ridge regression on the support's features, which the backbone makes as it is."""

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        return split.free(split.features("frozen", fold.frozen), tasks, fold.codec.head)
