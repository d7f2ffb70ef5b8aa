"""The mean of the training adapters for every task."""

from typing import Any

from fold import Fold
from splits import Split

from mcdi_hf import Task

from .base import Method


class MeanAdapter(Method):
    """What the generator starts from, at strength 0 and with imprinted heads."""

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        features = split.features("mean adapter", fold.codec.mean_adapter())
        return split.free(features, tasks, fold.codec.config.imprint_scale)
