"""A metric on frozen features that is learnt on the training tasks: what a classifier can have without any adapter."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from fold import Fold
from splits import Split, Tensors

from mcdi_hf import Task
from mcdi_hf.adapters.head import RidgeHead, head_logits
from mcdi_hf.data.episodes import SupportBatch, task_losses
from mcdi_hf.trajectories.shared import SCALAR_RATE, SCALARS, WARMUP_STEPS

from .base import Method
from .logistic import features_of, mean_pooled, mean_pooled_features, mean_pools


LEARNING_RATE, STACKS = 1e-3, 300  # stacks of tasks that are drawn, and gone through again and again


class LearntMetric(Method):
    """A square matrix that features go through and a head in closed form, learnt together by the query's loss with the
    steps of the shared start; of texts the mean of the tokens, see [`mean_pooled_features`]."""

    needs_training = True

    def fits(self, fold: Fold, seed: int) -> bool:
        return not fold.backbone.is_causal_lm and super().fits(fold, seed)

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        learnt = dict(fold.kept("metric", lambda: learn_metric(fold)))
        if mean_pools(fold):
            features = mean_pooled_features(split, fold)
        else:
            features = split.features("frozen", fold.frozen)
        head = RidgeHead(**{name: learnt[name].item() for name in asdict(RidgeHead())})
        return split.free(features @ learnt["metric"].to(features), tasks, head)


def training_features(fold: Fold, rows: torch.Tensor) -> torch.Tensor:
    """What a metric is learnt on of some training rows `(n,)`: `(n, feature_dim)`."""
    with fold.autocast():
        if mean_pools(fold):
            return features_of(mean_pooled(fold), fold.training.inputs(rows.tolist())).float()
        return fold.stacked.features_of_all(fold.frozen, fold.training.examples, rows).float()


def learn_metric(fold: Fold) -> Tensors:
    """The matrix `"metric"`, from the identity on, and the numbers of its head."""
    training, means = fold.training, fold.training.shared_start
    stacks = [training.sampler.stack(number, means["tasks_per_step"]) for number in range(min(STACKS, means["steps"]))]
    parts = [[SupportBatch.from_tasks(tasks, part) for part in ("support", "query")] for tasks in stacks]
    rows = torch.from_numpy(np.unique(torch.cat([batch.rows.flatten() for pair in parts for batch in pair]).numpy()))
    features = training_features(fold, rows)
    metric = torch.eye(features.shape[1], requires_grad=True)
    scalars = {name: torch.tensor(asdict(RidgeHead())[name], requires_grad=True) for name in SCALARS}
    groups = [{"params": [metric]}, {"params": list(scalars.values()), "lr": SCALAR_RATE * LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0)
    norm, steps = features.norm(dim=1).mean().item(), means["steps"]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        support, query = parts[step % len(parts)]
        seen, asked = (features[torch.searchsorted(rows, batch.rows)] @ metric for batch in (support, query))
        head = RidgeHead(**scalars, feature_norm=norm)(seen, support.labels, support.class_mask)
        losses = task_losses(head_logits(asked, *head, support.class_mask), query.labels)
        loss = (losses / support.class_mask.sum(dim=1).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    kept = {name: value.detach().double() for name, value in scalars.items()}
    return kept | {"metric": metric.detach(), "feature_norm": torch.tensor(norm, dtype=torch.float64)}
