"""Logistic regression on the features of the frozen backbone."""

import torch
from fold import Fold
from splits import TASKS_AT_ONCE, Split

from mcdi_hf import FrozenBackbone, Task
from mcdi_hf.adapters.head import head_logits
from mcdi_hf.adapters.logistic import fit_logistic
from mcdi_hf.data.episodes import task_accuracies

from .base import Method


class Logistic(Method):
    """The features are scaled to unit variance on the validation examples; validation chooses the penalty."""

    def settings(self, split: Split, fold: Fold, shots: int) -> list[float]:
        return [0.1, 1.0, 10.0, 100.0]

    def features(self, split: Split, fold: Fold) -> torch.Tensor:
        """What the regression reads of every example: `(views, rows, feature_dim)`."""
        return split.features("frozen", fold.frozen)

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: float) -> list[float]:
        known = self.features(fold.split("validation"), fold)[0]  # never of the test tasks' queries
        mean = known.mean(dim=0)
        features = (self.features(split, fold) - mean) / (known - mean).square().mean().sqrt()
        found = []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            support, query = split.support(part), split.query(part)
            seen = features.mean(dim=0)[support.plain_rows]
            head = fit_logistic(seen, support.labels, support.class_mask, setting)
            logits = head_logits(features[0][query.rows], *head, query.class_mask)
            found += task_accuracies(logits, query.labels).tolist()
        return found


class MeanPooledLogistic(Logistic):
    """The same on the mean of the tokens, which is what a sentence encoder was pretrained to be judged by; texts only."""

    def fits(self, fold: Fold, seed: int) -> bool:
        return mean_pools(fold)

    def features(self, split: Split, fold: Fold) -> torch.Tensor:
        return mean_pooled_features(split, fold)


def mean_pools(fold: Fold) -> bool:
    """Whether the mean of the tokens is something else than the backbone's own features."""
    return fold.backbone.pooling == "default" and not fold.backbone.reads_images


def mean_pooled_features(split: Split, fold: Fold) -> torch.Tensor:
    """The mean of the tokens of every example: `(1, rows, feature_dim)`."""
    every = range(len(split.table))
    return split.once("mean pooled", lambda: features_of(mean_pooled(fold), split.inputs(every))[None])


def mean_pooled(fold: Fold) -> FrozenBackbone:
    """The backbone as it gives the mean of its tokens, loaded once."""

    def load() -> FrozenBackbone:
        backbone = FrozenBackbone.from_pretrained(fold.backbone_folder, "mean", max_length=fold.backbone.max_length)
        setattr(backbone.model, backbone.head_name, torch.nn.Identity())
        return backbone

    return fold.once("mean pooled", load)


@torch.no_grad()
def features_of(backbone: FrozenBackbone, texts: list) -> torch.Tensor:
    """What the head of a backbone read of texts before it was taken off, texts of like length together."""
    order = sorted(range(len(texts)), key=lambda place: len(str(texts[place])))
    parts = [order[first : first + 64] for first in range(0, len(order), 64)]
    found = torch.cat([backbone.model(**backbone.inputs([texts[place] for place in part])).logits for part in parts])
    return found[torch.tensor(order).argsort()]
