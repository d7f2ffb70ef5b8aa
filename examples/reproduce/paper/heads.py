"""Linear heads of five classes: the episodes that judge them, and the trajectories that Adam takes to them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from mcdi_hf.trajectories.collect import sam_perturbation


WAYS, SEEN_DRAWERS = 5, 15  # an optimiser sees the first drawers of a character; the others tell what it is worth
STEPS, ROWS = 60, 25  # of Adam, and of each of its batches


@dataclass
class Episodes:
    """5-way tasks with one shot of a class: `support` `(tasks, 5, 64)` and `query` `(tasks, queries, 64)`, whose classes
    are `labels` `(queries,)` in every task."""

    support: torch.Tensor
    query: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def draw(cls, features: torch.Tensor, count: int, seed: int) -> "Episodes":
        """Of five characters, one drawer of each to learn from and all others to classify, from `(classes, drawers,
        views, 64)`."""
        generator = torch.Generator().manual_seed(seed)
        classes = torch.rand(count, len(features), generator=generator).topk(WAYS).indices
        drawers = torch.rand(count, features.shape[1], generator=generator).argsort(dim=1)
        support = features[classes, drawers[:, :1], 0]
        query = features[classes[:, :, None], drawers[:, None, 1:], 0].flatten(1, 2)
        return cls(support, query, torch.arange(WAYS).repeat_interleave(features.shape[1] - 1))

    def accuracies(self, heads: torch.Tensor) -> torch.Tensor:
        """The share of each task's queries that its head `(tasks, 5, 65)` classifies rightly: `(tasks,)`."""
        return (logits(heads, self.query).argmax(dim=-1) == self.labels).float().mean(dim=1)


@dataclass
class Trajectories:
    """What Adam made of many tasks: their `classes` `(tasks, 5)`, the Gaussian `start` `(tasks, 5, 65)` and the heads
    after every so many steps, `targets` `(tasks, count, 5, 65)`."""

    classes: torch.Tensor
    start: torch.Tensor
    targets: torch.Tensor


def logits(heads: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Heads `(tasks, 5, 65)`, the bias last, and features `(tasks, rows, 64)` -> `(tasks, rows, 5)`."""
    return features @ heads[..., :-1].transpose(1, 2) + heads[..., -1].unsqueeze(1)


def loss_and_gradient(
    heads: torch.Tensor, features: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy of every task, `(tasks,)`, and its gradient with respect to the heads, in closed form."""
    found = logits(heads, features)
    wanted = functional.one_hot(labels, WAYS).to(found.dtype)
    error = (found.softmax(dim=-1) - wanted) / len(labels)
    gradient = error.transpose(1, 2) @ functional.pad(features, (0, 1), value=1.0)
    return -(found.log_softmax(dim=-1) * wanted).sum(dim=(1, 2)) / len(labels), gradient


class Adam:
    """Adam for many tasks at once (Kingma & Ba 2015): `step` gives what is to be taken from the weights."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate, self.count = learning_rate, 0
        self.first, self.second = torch.zeros(()), torch.zeros(())

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        root = (self.second / (1 - 0.999**self.count)).sqrt() + 1e-8
        return self.learning_rate / (1 - 0.9**self.count) * self.first / root


def optimise(
    features: torch.Tensor,
    tasks: int,
    learning_rate: float,
    sam_rho: float,
    keep: int,
    seed: int = 0,
    start_seed: int = 0,
) -> Trajectories:
    """Trajectories of `tasks` tasks of the classes of `features`, from starts of variance 1, all in one pass; heads are kept
    `keep` times, at equal intervals.

    The classes and the batches depend on `seed` only, and the starts on `start_seed`, too. `sam_rho` is the reach of
    sharpness-aware minimisation, 0 to go without.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.rand(tasks, len(features), generator=generator).topk(WAYS).indices
    shape = tasks, WAYS, features.shape[-1] + 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * start_seed + seed))
    targets = descend(start, features, classes, head_gradient, learning_rate, sam_rho, keep, generator)
    return Trajectories(classes, start, targets)


def head_gradient(heads: torch.Tensor, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss_and_gradient(heads, batch, labels)[1]


def descend(
    weights: torch.Tensor,
    inputs: torch.Tensor,
    classes: torch.Tensor,
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    learning_rate: float,
    sam_rho: float,
    keep: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Adam's steps on the weights `(tasks, ...)` of tasks whose `classes` `(tasks, 5)` are those of `inputs`; kept `keep` times,
    `(tasks, keep, ...)`. `gradient(weights, batch, labels)` is that of each task's loss."""
    adam, targets = Adam(learning_rate), []
    kept = {round(i * STEPS / keep) for i in range(1, keep + 1)}
    labels, shape = torch.arange(WAYS).repeat(ROWS // WAYS), (len(classes), ROWS)
    for step in range(1, STEPS + 1):
        drawers = torch.randint(SEEN_DRAWERS, shape, generator=generator)
        views = torch.randint(inputs.shape[2], shape, generator=generator)
        batch = inputs[classes[:, labels], drawers, views]
        slope = gradient(weights, batch, labels)
        if sam_rho:
            slope = gradient(weights + sam_perturbation(slope, sam_rho), batch, labels)
        weights = weights - adam.step(slope)
        if step in kept:
            targets.append(weights)
    return torch.stack(targets, dim=1)


def unseen(features: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of each task's characters that its optimiser did not see, `(tasks, rows, 64)`, and their labels."""
    rows = features[classes][:, :, SEEN_DRAWERS:, 0].flatten(1, 2)
    return rows, torch.arange(WAYS).repeat_interleave(features.shape[1] - SEEN_DRAWERS)


def sharpness(heads: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, reach: float) -> torch.Tensor:
    """How far the loss rises a step of length `reach` uphill, `(tasks,)`: what SAM makes small."""
    loss, gradient = loss_and_gradient(heads, features, labels)
    return loss_and_gradient(heads + sam_perturbation(gradient, reach), features, labels)[0] - loss
