"""Weight preparation: optimise the adapters of many tasks at once and keep the local targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..adapters.head import class_means, imprint_head
from ..adapters.stacked import StackedLora
from ..backbones import EncodedExamples
from ..tasks import Task
from .shared import rows_and_labels


@dataclass(frozen=True)
class TrajectorySettings:
    """How a task's adapter is optimised.

    Attributes:
        num_steps (`int`): Steps of the optimiser.
        num_targets (`int`): Local targets kept, at equal intervals; the last one is the end.
        batch_size (`int`): Examples a task and a step.
        learning_rate (`float`): Adam's, with a linear decay to zero.
        imprint_scale (`float`): The sharpness of the head that training starts from.
        seed (`int`): Of the batches; a task's batches depend on it and the task's number only.
    """

    num_steps: int = 30
    num_targets: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    imprint_scale: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_targets <= self.num_steps:
            raise ValueError(f"num_targets is {self.num_targets}: expected 1 to num_steps ({self.num_steps}).")

    @property
    def target_steps(self) -> list[int]:
        """The steps after which a target is kept: `M / k, 2 M / k, ..., M`, rounded."""
        return [round(i * self.num_steps / self.num_targets) for i in range(1, self.num_targets + 1)]


def collect_trajectories(
    stacked: StackedLora,
    examples: EncodedExamples,
    start: dict[str, torch.Tensor],
    tasks: list[Task],
    numbers: list[int],
    settings: TrajectorySettings,
    on_step: Callable[[], None] | None = None,
) -> list[dict]:
    """Optimise one stack of adapters, each on all the support rows of its task, and judge them on the query rows.

    Adam works element by element, so a stack gives each task what a run of its own would give.

    Args:
        stacked (`StackedLora`):
            The adapted layers.
        examples (`EncodedExamples`):
            The data set that the tasks' rows point into.
        start (`dict[str, torch.Tensor]`):
            The shared start, key -> `(1, *shape)`, without a head: that is imprinted from the task's support.
        tasks (`list[Task]` of length `N`):
            The tasks, with any numbers of classes.
        numbers (`list[int]`):
            The tasks' numbers, which seed their batches.
        settings (`TrajectorySettings`):
            The optimiser's.
        on_step (`Callable`, *optional*):
            Called after each step of the stack.

    Returns:
        For every task a row of the trajectory data set: see [`trajectory_features`].
    """
    support = [rows_and_labels(task.support) for task in tasks]
    ways = [len(task.classes) for task in tasks]
    class_mask = torch.arange(max(ways)) < torch.tensor(ways).unsqueeze(-1)
    tensors = {key: value.repeat(len(tasks), 1, 1) for key, value in start.items()}
    tensors |= _imprinted_heads(stacked, examples, start, support, class_mask, settings.imprint_scale)
    for value in tensors.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(tensors.values(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.num_steps)
    batches = [_batches(settings, number, len(rows)) for number, (rows, _) in zip(numbers, support)]
    weights, losses = [], []
    for step in range(1, settings.num_steps + 1):
        picks = [torch.from_numpy(next(batch)) for batch in batches]
        rows = torch.cat([rows[pick] for (rows, _), pick in zip(support, picks)])
        labels = torch.stack([labels[pick] for (_, labels), pick in zip(support, picks)])
        logits = stacked.logits(tensors, examples[rows], class_mask)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        if step in settings.target_steps:
            weights.append(torch.cat([value.detach().flatten(1) for value in tensors.values()], dim=1))
            losses.append(loss.detach())
        if on_step is not None:
            on_step()
    weights, losses = torch.stack(weights, dim=1), torch.stack(losses, dim=1)
    if not torch.isfinite(weights).all():
        raise ValueError(f"A trajectory diverged: learning_rate {settings.learning_rate} is too high for its tasks.")
    accuracies = _query_accuracies(stacked, examples, tensors, tasks, class_mask)
    sizes = [value[0].numel() for value in tensors.values()]
    return [
        {
            "task": number,
            "classes": list(task.classes),
            "support": [list(rows) for rows in task.support],
            "steps": settings.target_steps,
            "losses": losses[index].tolist(),
            "accuracy": accuracies[index],
            "weights": _without_padding(weights[index], sizes, ways[index]).numpy(),
        }
        for index, (number, task) in enumerate(zip(numbers, tasks))
    ]


def _imprinted_heads(
    stacked: StackedLora,
    examples: EncodedExamples,
    start: dict[str, torch.Tensor],
    support: list[tuple[torch.Tensor, torch.Tensor]],
    class_mask: torch.Tensor,
    scale: float,
) -> dict[str, torch.Tensor]:
    features = stacked.features_of_all(start, examples, torch.cat([rows for rows, _ in support]))
    features = features.split([len(rows) for rows, _ in support])
    means = [
        class_means(own.unsqueeze(0), labels.unsqueeze(0), class_mask.shape[1])
        for own, (_, labels) in zip(features, support)
    ]
    return dict(zip(stacked.layout.head_keys, imprint_head(torch.cat(means), scale, class_mask)))


def _batches(settings: TrajectorySettings, number: int, size: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng((settings.seed, number))
    while True:
        yield random.choice(size, size=settings.batch_size, replace=size < settings.batch_size)


@torch.no_grad()
def _query_accuracies(
    stacked: StackedLora,
    examples: EncodedExamples,
    tensors: dict[str, torch.Tensor],
    tasks: list[Task],
    class_mask: torch.Tensor,
) -> list[float]:
    accuracies = []
    for index, task in enumerate(tasks):
        rows, labels = rows_and_labels(task.query)
        own = {key: value[index : index + 1] for key, value in tensors.items()}
        logits = stacked.logits(own, examples[rows], class_mask[index : index + 1])
        accuracies.append((logits[0].argmax(dim=-1) == labels).float().mean().item())
    return accuracies


def _without_padding(weights: torch.Tensor, sizes: list[int], ways: int) -> torch.Tensor:
    """Cut the padding classes out of the two last tensors, the head's."""
    *lora, weight, bias = weights.split(sizes, dim=1)
    feature_dim = sizes[-2] // sizes[-1]
    return torch.cat([*lora, weight[:, : ways * feature_dim], bias[:, :ways]], dim=1)
