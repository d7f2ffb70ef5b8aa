"""Weight preparation: optimise the adapters of many tasks at once and keep the local targets."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler

from ..adapters.head import head_logits
from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, rows_and_labels, task_accuracies, task_losses
from ..data.tasks import Task


# A batch of texts is passed in up to so many parts, each task's shortest texts first, so that few are padded to the
# longest; but a pass of fewer rows than these costs more than the padding that it saves.
TEXT_PARTS, LEAST_ROWS = 4, 32
# The schedules of transformers that need no arguments of their own.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrajectorySettings:
    """How a task's adapter is optimised.

    Attributes:
        num_steps (`int`): Steps of the optimiser.
        num_targets (`int`): Local targets kept, at equal intervals; the last one is the end.
        batch_size (`int`): Examples a task and a step.
        learning_rate (`float`): AdamW's.
        weight_decay (`float`): AdamW's; at 0 it is Adam.
        lr_scheduler (`str`): A name that `transformers.get_scheduler` knows.
        lr_warmup_steps (`int`): Steps in which the learning rate rises from zero.
        sam_rho (`float`): How far sharpness-aware minimisation steps uphill, for each adapter; 0 is without.
        imprint_scale (`float`): The sharpness of the head that training starts from.
        seed (`int`): Of the batches; a task's batches depend on it and the task's number only.
    """

    num_steps: int = 30
    num_targets: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    lr_warmup_steps: int = 0
    sam_rho: float = 0.0
    imprint_scale: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_targets <= self.num_steps:
            raise ValueError(f"num_targets is {self.num_targets}: expected 1 to num_steps ({self.num_steps}).")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}: expected one of {', '.join(LR_SCHEDULERS)}.")
        if self.sam_rho < 0:
            raise ValueError(f"sam_rho is {self.sam_rho}: expected a distance, 0 for training without SAM.")

    @property
    def target_steps(self) -> list[int]:
        """The steps after which a target is kept: `M / k, 2 M / k, ..., M`, rounded."""
        return [round(i * self.num_steps / self.num_targets) for i in range(1, self.num_targets + 1)]


def sam_perturbation(gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The step uphill of sharpness-aware minimisation, `rho * g / |g|`, for every task of gradients `(N, *shape)` with
    a norm over all tensors of its own (Foret et al. 2021, equation 2 with p = 2). A gradient of zero does not step.
    """
    norms = sum(value.flatten(1).square().sum(dim=1) for value in gradients).sqrt()
    scales = rho / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return [value * scales.view(-1, *[1] * (value.ndim - 1)) for value in gradients]


def part_size(examples: EncodedExamples, batch_size: int, num_tasks: int) -> int:
    """How many of a task's examples are passed at once in a stack of `num_tasks`."""
    if examples.counts is None:
        return batch_size
    return min(batch_size, max(math.ceil(batch_size / TEXT_PARTS), math.ceil(LEAST_ROWS / num_tasks)))


class TaskStack:
    """The adapters of several tasks on the way: their tensors, their batches, and their losses.

    All start from one adapter, key -> `(1, *shape)`, with heads imprinted from `start_features` `(rows,
    feature_dim)`, what the head reads of every example under it, or with a language model's verbalizers, which need
    no features and are not trained. `scale` is the sharpness of an imprinted head.
    """

    def __init__(
        self,
        stacked: StackedLora,
        examples: EncodedExamples,
        start: dict[str, torch.Tensor],
        start_features: torch.Tensor | None,
        tasks: list[Task],
        scale: float,
    ) -> None:
        self.stacked, self.examples, self.tasks = stacked, examples, tasks
        self.support = [rows_and_labels(task.support) for task in tasks]
        batch = SupportBatch.from_tasks(tasks, device=stacked.device)
        if start_features is not None:
            batch.features = start_features[batch.rows]
        self.class_mask = batch.class_mask
        self.head = stacked.free_heads(batch, scale)
        self.tensors = {key: value.to(stacked.device).repeat(len(tasks), 1, 1) for key, value in start.items()}
        self.tensors |= dict(zip(stacked.layout.head_keys, self.head))

    def draw(self, batch_size: int, randoms: list[np.random.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch for every task, each sorted by length, any view of an example: rows and labels `(N, b)`."""
        all_rows, all_labels = [], []
        for (rows, labels), random in zip(self.support, randoms):
            picks = torch.from_numpy(random.choice(len(rows), size=batch_size, replace=len(rows) < batch_size))
            rows, labels = rows[picks], labels[picks]
            if self.examples.num_views > 1:
                views = random.integers(self.examples.num_views, size=batch_size)
                rows = rows + len(self.examples) * torch.from_numpy(views)
            rows, labels = self._by_length(rows, labels)
            all_rows.append(rows)
            all_labels.append(labels)
        return torch.stack(all_rows), torch.stack(all_labels).to(self.stacked.device)

    def _by_length(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = self.examples.lengths(rows).argsort(stable=True)
        return rows[order], labels[order]

    def logits(self, tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """The logits of every task on rows `(N, b)` of its own: `(N, b, classes)`, minus infinity for padding."""
        features = self.stacked.features(tensors, self.examples[rows.flatten()])
        head = [tensors[key] for key in self.stacked.layout.head_keys] or self.head
        return head_logits(features, *head, self.class_mask)

    def gradients(
        self, trained: list[torch.Tensor], rows: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the gradients of the losses into `trained`; return the losses and the numbers of right answers `(N,)`."""
        for value in trained:
            value.grad = None
        losses = right = 0
        columns = part_size(self.examples, rows.shape[1], len(rows))
        for part, part_labels in zip(rows.split(columns, dim=1), labels.split(columns, dim=1)):
            logits = self.logits(self.tensors, part)
            loss = task_losses(logits, part_labels) * (part.shape[1] / rows.shape[1])
            loss.sum().backward(inputs=trained)
            losses = losses + loss.detach()
            right = right + (logits.detach().argmax(dim=-1) == part_labels).sum(dim=1)
        return losses, right

    def sam_gradients(self, trained: list[torch.Tensor], rows: torch.Tensor, labels: torch.Tensor, rho: float) -> None:
        """Replace the gradients in `trained` by those a step uphill along them, see [`sam_perturbation`]."""
        perturbation = sam_perturbation([value.grad for value in trained], rho)
        with torch.no_grad():
            torch._foreach_add_(trained, perturbation)
        self.gradients(trained, rows, labels)
        with torch.no_grad():
            torch._foreach_sub_(trained, perturbation)

    @torch.no_grad()
    def query_accuracies(self, rows_at_once: int = 512) -> list[float]:
        """The share of its query that each task's adapter classifies rightly."""
        rows, labels = zip(*(self._by_length(*rows_and_labels(task.query)) for task in self.tasks))
        rows = pad_sequence(rows, batch_first=True)
        labels = pad_sequence(labels, batch_first=True, padding_value=-1).to(self.stacked.device)
        columns = max(1, rows_at_once // len(rows))
        logits = [self.logits(self.tensors, part) for part in rows.split(columns, dim=1)]
        return task_accuracies(torch.cat(logits, dim=1), labels).tolist()


def collect_trajectories(
    stacked: StackedLora,
    examples: EncodedExamples,
    start: dict[str, torch.Tensor],
    start_features: torch.Tensor | None,
    tasks: list[Task],
    numbers: list[int],
    settings: TrajectorySettings,
) -> list[dict]:
    """Optimise one stack of adapters, each on all the support rows of its task, and judge them on the query rows.
    AdamW works element by element, so a stack gives each task what a run of its own would give.

    The arguments are those of [`TaskStack`]; the tasks' `numbers` seed their batches. Returned is a row of the
    trajectory data set for every task, see [`trajectory_features`]. A `ValueError` says that the weights of a task
    became infinite or NaN.
    """
    stack = TaskStack(stacked, examples, start, start_features, tasks, settings.imprint_scale)
    trained = [value.requires_grad_() for value in stack.tensors.values()]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, settings.lr_warmup_steps, settings.num_steps)
    randoms = [np.random.default_rng((settings.seed, number)) for number in numbers]
    snapshots, losses, seen = [_snapshot(stack)], [], 0
    right = torch.zeros(len(tasks), device=stacked.device)
    for step in range(1, settings.num_steps + 1):
        rows, labels = stack.draw(settings.batch_size, randoms)
        loss, step_right = stack.gradients(trained, rows, labels)
        if settings.sam_rho:
            stack.sam_gradients(trained, rows, labels, settings.sam_rho)
        optimizer.step()
        schedule.step()
        right, seen = right + step_right, seen + rows.shape[1]
        if step in settings.target_steps:
            snapshots.append(_snapshot(stack))
            losses.append(loss)
            train_accuracies, right, seen = (right / seen).tolist(), torch.zeros_like(right), 0
    weights = _flat_trajectories(stack, snapshots, settings)
    losses = torch.stack(losses, dim=1).tolist()
    return [
        {
            "task": number,
            "group": task.group,
            "classes": list(task.classes),
            "support": [list(rows) for rows in task.support],
            "steps": [0, *settings.target_steps],
            "losses": losses[index],
            "train_accuracy": train_accuracies[index],
            "accuracy": accuracy,
            "weights": weights[index],
        }
        for index, (number, task, accuracy) in enumerate(zip(numbers, tasks, stack.query_accuracies()))
    ]


def _snapshot(stack: TaskStack) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in stack.tensors.items()}


def _flat_trajectories(
    stack: TaskStack, snapshots: list[dict[str, torch.Tensor]], settings: TrajectorySettings
) -> list[np.ndarray]:
    """For every task its snapshots, flat and without padding classes: `(k + 1, P)`."""
    layout = stack.stacked.layout
    tensors = {key: torch.stack([one[key] for one in snapshots], dim=1) for key in snapshots[0]}
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError(f"A trajectory diverged: learning_rate {settings.learning_rate} is too high for its tasks.")
    flat = []
    for index, ways in enumerate(stack.class_mask.sum(dim=1).tolist()):
        own = [value[index, :, :ways] if key in layout.head_keys else value[index] for key, value in tensors.items()]
        flat.append(torch.cat([value.flatten(1) for value in own], dim=1).cpu().numpy())
    return flat
