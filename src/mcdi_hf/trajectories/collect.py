"""Weight preparation: optimise the adapters of many tasks at once, in the shared basis, and keep the local targets."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import get_scheduler

from ..adapters.codec import AdapterCodec
from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_accuracies, task_losses
from ..data.tasks import Task, draw_shots


# The schedules of transformers that need no arguments of their own.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrajectorySettings:
    """How a task's adapter is optimised.

    Attributes:
        num_steps (`int`): Steps of the optimiser.
        num_targets (`int`): Local targets kept, at equal intervals; the last one is the end.
        shots (`tuple[int, int]`): The least and the greatest number of examples a class that a step's head is made of.
        queries (`int`): Other examples a class that the step is judged on.
        learning_rate (`float`): AdamW's, for the coefficients z.
        weight_decay (`float`): AdamW's; at 0 it is Adam.
        lr_scheduler (`str`): A name that `transformers.get_scheduler` knows.
        lr_warmup_steps (`int`): Steps in which the learning rate rises from zero.
        sam_rho (`float`): How far sharpness-aware minimisation steps uphill, for each adapter; 0 is without.
        seed (`int`): Of the batches; a task's batches depend on it and the task's number only.
        mixed_precision (`str`): `"bf16"` runs the upper layers in bfloat16; `"no"` does not.

    Example: `TrajectorySettings(num_steps=24, num_targets=3, sam_rho=0.05)`
    """

    num_steps: int = 24
    num_targets: int = 3
    shots: tuple[int, int] = (1, 16)
    queries: int = 8
    learning_rate: float = 0.15
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    lr_warmup_steps: int = 0
    sam_rho: float = 0.0
    seed: int = 0
    mixed_precision: str = "no"

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


def sam_perturbation(gradient: torch.Tensor, rho: float) -> torch.Tensor:
    """The step uphill of sharpness-aware minimisation, `rho * g / |g|`, for every task of a gradient `(tasks, *shape)`
    (Foret et al. 2021, equation 2 with p = 2). A gradient of zero does not step.
    """
    # The squares of a tiny gradient would be zero, and dividing by their root a step without bounds.
    tasks = -1, *[1] * (gradient.ndim - 1)
    largest = gradient.flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    scaled = gradient / largest.view(tasks)
    return scaled * (rho / scaled.flatten(1).norm(dim=1).clamp(min=1)).view(tasks)


class TaskStack:
    """The coefficients of several tasks on the way, `(tasks, num_tokens, token_dim)`, from z = 1.

    A step draws `ways` of the classes of each task. A `ValueError` says that a task has fewer, or that a class has fewer
    support rows than a step draws.
    """

    def __init__(
        self,
        stacked: StackedLora,
        codec: AdapterCodec,
        examples: EncodedExamples,
        tasks: list[Task],
        ways: int,
        settings: TrajectorySettings,
    ) -> None:
        self.stacked, self.codec, self.examples = stacked, codec, examples
        self.tasks, self.ways, self.settings = tasks, ways, settings
        self.coefficients = torch.ones(len(tasks), *codec.filled.shape, device=stacked.device, requires_grad=True)
        if fewest := [count for task in tasks if (count := len(task.classes)) < ways]:
            raise ValueError(f"A stack of {ways} ways has tasks of {fewest} classes: expected as many at least.")
        needed = settings.shots[1] + settings.queries
        if (least := min(len(rows) for task in tasks for rows in task.support)) < needed:
            raise ValueError(f"A class has {least} support rows: expected {needed}, the shots and queries of a step.")

    def draw(self, step: int, randoms: list[np.random.Generator]) -> tuple[SupportBatch, SupportBatch]:
        """Draw of every task's support what a head is made of and what it is judged on, any view of an example. The
        number of shots depends on the step alone, so that a stack is of one shape whoever is in it."""
        shots = draw_shots(self.settings.shots, np.random.default_rng((self.settings.seed, step, 3)))
        count, views = shots + self.settings.queries, self.examples.num_views
        chosen = [random.permutation(len(task.classes))[: self.ways] for task, random in zip(self.tasks, randoms)]
        drawn = np.stack(
            [
                [random.choice(task.support[number], count, replace=False) for number in own]
                for task, own, random in zip(self.tasks, chosen, randoms)
            ]
        )
        classes = [tuple(task.classes[number] for number in own) for task, own in zip(self.tasks, chosen)]
        if views > 1:
            moved = [random.integers(views, size=drawn.shape[1:]) for random in randoms]
            drawn = drawn + len(self.examples) * np.stack(moved)
        parts = np.split(drawn, [shots], axis=2)
        return self._batch(parts[0], classes), self._batch(parts[1], classes)

    def losses(self, support: SupportBatch, query: SupportBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropy over log(classes) and the accuracy of every task's query: `(tasks,)` each."""
        logits = self._logits(self.coefficients, support, query)
        return task_losses(logits, query.labels) / np.log(self.ways), task_accuracies(logits, query.labels)

    def gradient(self, support: SupportBatch, query: SupportBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the gradients of the losses into the coefficients, those a step uphill with SAM; return losses and
        accuracies at the coefficients themselves."""
        losses, accuracies = self.losses(support, query)
        (gradient,) = torch.autograd.grad(losses.sum(), self.coefficients)
        if self.settings.sam_rho:
            uphill = sam_perturbation(gradient, self.settings.sam_rho)
            with torch.no_grad():
                self.coefficients += uphill
            (gradient,) = torch.autograd.grad(self.losses(support, query)[0].sum(), self.coefficients)
            with torch.no_grad():
                self.coefficients -= uphill
        self.coefficients.grad = gradient * self.codec.filled
        return losses.detach(), accuracies

    @torch.no_grad()
    def query_accuracies(self, coefficients: torch.Tensor) -> list[float]:
        """The share of every task's query that its adapter classifies rightly, its head made of the first examples of
        its support, as many as the most shots of a step."""
        shots = self.settings.shots[1]
        heads = [[rows[:shots] for rows in task.support] for task in self.tasks]
        classes = [task.classes for task in self.tasks]
        support = SupportBatch.from_rows(heads, classes, device=self.stacked.device)
        query = SupportBatch.from_tasks(self.tasks, "query", self.stacked.device)
        support.examples = query.examples = self.examples
        return task_accuracies(self._logits(coefficients, support, query), query.labels).tolist()

    def _logits(self, coefficients: torch.Tensor, support: SupportBatch, query: SupportBatch) -> torch.Tensor:
        bf16 = self.settings.mixed_precision == "bf16"
        with torch.autocast(self.stacked.device.type, torch.bfloat16, enabled=bf16):
            return self.stacked.episode_logits(self.codec.matrices(coefficients), self.codec.head, support, query)

    def _batch(self, rows: np.ndarray, classes: list[tuple[str, ...]]) -> SupportBatch:
        """Rows `(tasks, ways, examples)` of some classes as a batch."""
        labels = torch.arange(self.ways).repeat_interleave(rows.shape[2]).expand(len(rows), -1)
        mask = torch.ones(len(rows), self.ways, dtype=torch.bool)
        device = self.stacked.device
        rows = torch.from_numpy(rows.reshape(len(rows), -1))
        return SupportBatch(labels.to(device), mask.to(device), rows, examples=self.examples, classes=classes)


def collect_trajectories(
    stacked: StackedLora,
    codec: AdapterCodec,
    examples: EncodedExamples,
    tasks: list[Task],
    numbers: list[int],
    ways: int,
    settings: TrajectorySettings,
) -> list[dict]:
    """Optimise one stack of adapters, each on the support rows of its task, `ways` of its classes a step, and judge them
    on the query rows of all its classes. AdamW works element by element, so a stack gives each task what a run of its
    own would give.

    The tasks' `numbers` seed their batches. Returned is a row of the trajectory data set for every task, see
    [`trajectory_features`]. A `ValueError` says that the weights of a task became infinite or NaN.

    Example: `rows = collect_trajectories(stacked, codec, examples, tasks, range(8), ways=2,
    settings=TrajectorySettings())`
    """
    stack = TaskStack(stacked, codec, examples, tasks, ways, settings)
    optimizer = torch.optim.AdamW([stack.coefficients], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, settings.lr_warmup_steps, settings.num_steps)
    randoms = [np.random.default_rng((settings.seed, number)) for number in numbers]
    snapshots, losses, right = [stack.coefficients.detach().clone()], [], []
    for step in range(1, settings.num_steps + 1):
        loss, accuracy = stack.gradient(*stack.draw(step, randoms))
        optimizer.step()
        schedule.step()
        right.append(accuracy)
        if step in settings.target_steps:
            snapshots.append(stack.coefficients.detach().clone())
            losses.append(loss)
    weights = torch.stack(snapshots, dim=1).flatten(2)
    if not torch.isfinite(weights).all():
        raise ValueError(f"A trajectory diverged: learning_rate {settings.learning_rate} is too high for its tasks.")
    last = len(right) - settings.num_steps // settings.num_targets
    columns = {
        "losses": torch.stack(losses, dim=1).tolist(),
        "train_accuracy": torch.stack(right[last:]).mean(dim=0).tolist(),
        "start_accuracy": stack.query_accuracies(snapshots[0]),
        "accuracy": stack.query_accuracies(snapshots[-1]),
        "weights": list(weights.cpu().numpy()),
    }
    return [
        {
            "task": number,
            "group": task.group,
            "classes": list(task.classes),
            "support": [list(rows) for rows in task.support],
            "steps": [0, *settings.target_steps],
        }
        | {name: values[index] for name, values in columns.items()}
        for index, (number, task) in enumerate(zip(numbers, tasks))
    ]
