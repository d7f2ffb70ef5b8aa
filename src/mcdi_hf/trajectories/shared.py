"""The shared start: one adapter that serves every training task, learnt with a head in closed form."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ..adapters.condition import see_support
from ..adapters.head import RidgeHead
from ..adapters.layout import AdapterLayout
from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_accuracies, task_losses
from ..data.stacks import StackSampler
from ..data.tasks import Task
from ..models.task_encoder import TaskEncoder, TaskEncoderOutput
from ..utils.files import read_tensors, write_file
from .description import differences


WARMUP_STEPS, LAST_RATE = 50, 0.05  # a share of the learning rate
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0
SCALAR_RATE, OWN_RATE = 5, 30  # times the learning rate of the matrices, whose numbers are many and small
RECALL_WEIGHT = 0.3  # of the encoder's cross-entropy over the sources
ENCODER = "encoder."
SCALARS = ("log_scale", "log_ridge", "log_ridge_shots")


def initial_adapter(layout: AdapterLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    """PEFT's own initialisation of one LoRA adapter: `lora_A` uniform within 1 / sqrt(in_features), `lora_B` zero.

    Returns:
        Key -> tensor of shape `(1, *shape)`, without a head.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in layout.modules:
        bound = 1 / math.sqrt(module.in_features)
        lora_a = torch.empty(1, *module.shape("lora_A")).uniform_(-bound, bound, generator=generator)
        tensors[module.key("lora_A")] = lora_a
        tensors[module.key("lora_B")] = torch.zeros(1, *module.shape("lora_B"))
    return tensors


def feature_norm(stacked: StackedLora, examples: EncodedExamples) -> float:
    """The mean norm of what the head reads of some 500 examples through the frozen backbone."""
    rows = torch.arange(0, len(examples), max(1, len(examples) // 500))
    start = {key: value.to(stacked.device) for key, value in initial_adapter(stacked.layout).items()}
    return stacked.features_of_all(start, examples, rows).norm(dim=1).mean().item()


def batches_of(
    tasks: list[Task], examples: EncodedExamples, device: torch.device
) -> tuple[SupportBatch, SupportBatch]:
    """The support sets and the queries of some tasks, with the table that their rows point into."""
    pair = [SupportBatch.from_tasks(tasks, part, device) for part in ("support", "query")]
    for batch in pair:
        batch.examples = examples
    return pair[0], pair[1]


def source_of(group: str) -> str:
    """The source that a group is of: what stands before the slash in its name, see [`load_table`]."""
    return group.split("/")[0]


def mean_accuracy(
    stacked: StackedLora,
    head: RidgeHead,
    examples: EncodedExamples,
    tasks: list[Task],
    adapters: Callable[[list[Task], SupportBatch], dict[str, torch.Tensor]],
    tasks_at_once: int = 8,
) -> float:
    """The mean accuracy on the queries of tasks under what `adapters` gives for some of them and their support sets: one
    adapter a task, or one for all, key on disk -> `(n, *shape)`."""
    found = []
    for first in range(0, len(tasks), tasks_at_once):
        part = tasks[first : first + tasks_at_once]
        support, query = batches_of(part, examples, stacked.device)
        logits = stacked.episode_logits(adapters(part, support), head, support, query)
        found.append(task_accuracies(logits, query.labels))
    return torch.cat(found).mean().item()


@dataclass
class SharedStart:
    """A shared adapter on its way: weights, the encoder beside it, the optimiser's moments, the best so far.

    Adapter and head are trained on episodes together: AdamW takes a step a stack of tasks, on the mean over tasks of
    the query's cross-entropy over log(classes), with a warm-up and a cosine. Some of the tasks are seen through
    coefficients z, `lora_B diag(z) lora_A`: those of their own source, which are learnt along as a prototype of the
    [`TaskEncoder`], or those that the encoder proposes of their support, for which it also learns to tell which source
    they are of. The others are seen through z = 1. So the adapter serves all tasks as it is, and its basis holds what
    tells tasks apart, in the way in which a generator will write it.

    Args:
        stacked ([`StackedLora`]): The backbone and the layout.
        examples ([`EncodedExamples`]): The table that tasks point into.
        sampler ([`StackSampler`]): Draws the stacks.
        sources (`list[str]`): The sources that have coefficients of their own, see [`source_of`].
        num_steps, tasks_per_step, learning_rate, seed: How it is trained; `seed` is that of the initialisation.
        own_share (`float`, *optional*, defaults to 0.3): The share of tasks that are seen through their source's own
            coefficients.
        proposed_share (`float`, *optional*, defaults to 0.7): The share of those that are seen through what the encoder
            proposes. With 0 for both it is one adapter for all, and nothing else.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"bf16"` runs the upper layers in bfloat16.
    """

    stacked: StackedLora
    examples: EncodedExamples
    sampler: StackSampler
    sources: list[str]
    num_steps: int = 1000
    tasks_per_step: int = 8
    learning_rate: float = 1e-3
    seed: int = 0
    own_share: float = 0.3
    proposed_share: float = 0.7
    mixed_precision: str = "no"
    step: int = field(default=0, init=False)
    curve: list[dict] = field(default_factory=list, init=False)
    best: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        device = self.stacked.device
        start = initial_adapter(self.stacked.layout, self.seed)
        self.tensors = {key: value.to(device).requires_grad_() for key, value in start.items()}
        self.norm = 1.0 if self.stacked.backbone.is_causal_lm else feature_norm(self.stacked, self.examples)
        defaults = asdict(RidgeHead())
        self.scalars = {name: torch.tensor(defaults[name], device=device, requires_grad=True) for name in SCALARS}
        layout = self.stacked.layout
        shape = len(layout.modules), layout.token_dim
        feature_dim = layout.feature_dim + self.examples.hidden_states.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.encoder = TaskEncoder(feature_dim, *shape, num_prototypes=max(1, len(self.sources))).to(device)
        parts = dict(self.encoder.named_parameters())
        prototypes = [parts.pop("prototypes")]
        groups = [
            {"params": list(self.tensors.values()), "weight_decay": WEIGHT_DECAY},
            {"params": list(self.scalars.values()), "weight_decay": 0.0, "lr": SCALAR_RATE * self.learning_rate},
            {"params": prototypes, "weight_decay": 0.0, "lr": OWN_RATE * self.learning_rate},
            {"params": list(parts.values()), "weight_decay": WEIGHT_DECAY},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    @property
    def head(self) -> RidgeHead:
        return RidgeHead(**self.scalars, feature_norm=self.norm)

    def train_step(self) -> float:
        """Take one step and return its loss."""
        tasks = self.sampler.stack(self.step, self.tasks_per_step)
        support, query = batches_of(tasks, self.examples, self.stacked.device)
        drawn = torch.from_numpy(np.random.default_rng((self.seed, self.step, 6)).random(len(tasks)))
        own, proposed = drawn < self.own_share, drawn >= 1 - self.proposed_share
        with self.autocast():
            read = self.read(support, proposed)
            numbers = [self.sources.index(source_of(task.group)) if self.sources else 0 for task in tasks]
            logits = self.stacked.episode_logits(self.seen_by(numbers, own, proposed, read), self.head, support, query)
        loss = (task_losses(logits, query.labels) / support.class_mask.sum(dim=1).log()).mean()
        total = loss
        if read is not None:
            wanted = torch.tensor(numbers, device=loss.device)[proposed.to(loss.device)]
            recalled = torch.nn.functional.cross_entropy(read.prototype_logits.float(), wanted)
            total = loss + RECALL_WEIGHT * recalled
        self.optimizer.zero_grad()
        total.backward()
        for part in ([*self.tensors.values(), *self.scalars.values()], self.encoder.parameters()):
            torch.nn.utils.clip_grad_norm_(part, MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def read(self, support: SupportBatch, proposed: torch.Tensor) -> TaskEncoderOutput | None:
        """What the encoder says of the tasks that are `proposed` `(tasks,)`, if any. What it sees is taken as given: only
        the encoder learns by it."""
        if not proposed.any():
            return None
        tensors = {key: value.detach() for key, value in self.tensors.items()}
        head = replace(self.head, **{name: value.detach() for name, value in self.scalars.items()})
        seen = see_support(self.stacked, tensors, head, support[proposed.nonzero().flatten()])
        return self.encoder(seen.features, seen.gradients, seen.labels, seen.class_mask)

    def seen_by(
        self, numbers: list[int], own: torch.Tensor, proposed: torch.Tensor, read: TaskEncoderOutput | None
    ) -> dict[str, torch.Tensor]:
        """The matrices that tasks are seen through, key -> `(tasks, *shape)`, or `(1, *shape)` if all are seen through
        z = 1. Those that are `own` `(tasks,)` are seen through the coefficients of the source of their number, those that
        are `proposed` through what was `read` of their support."""
        if not (own | proposed).any():
            return self.tensors
        prototypes = self.encoder.prototypes
        own, proposed = (mask.to(prototypes.device) for mask in (own, proposed))
        coefficients = torch.where(own[:, None, None], 1 + prototypes[numbers], 1.0)
        if read is not None:
            coefficients = coefficients.index_put((proposed,), 1 + read.proposal.float())
        return self.stacked.layout.scaled(self.tensors, coefficients)

    def validate(self, examples: EncodedExamples, kinds: dict[str, list[Task]]) -> float:
        """Judge the adapter on tasks of every kind, note the mean accuracies, and keep all that is learnt if it is the
        best: by what the encoder proposes, or without a share of that by z = 1. Kinds whose tasks are all of sources with
        coefficients of their own are judged through these, too: what a generator could gain at least."""
        views = {"": lambda tasks, support: self.tensors}
        if self.own_share:
            views[", own coefficients"] = self._all("own")
        if self.proposed_share:
            views[", proposed"] = self._all("proposed")
        found = {}
        with torch.no_grad(), self.autocast():
            for kind, tasks in kinds.items():
                known = all(source_of(task.group) in self.sources for task in tasks)
                for view, adapters in views.items():
                    if known or view != ", own coefficients":
                        accuracy = mean_accuracy(self.stacked, self.head, examples, tasks, adapters)
                        found[kind + view] = round(accuracy, 4)
        judged = ", proposed" if self.proposed_share else ""
        mean = sum(found[kind + judged] for kind in kinds) / len(kinds)
        if not self.best or mean > max(point["mean"] for point in self.curve):
            self.best = {name: value.detach().clone() for name, value in self._learnt().items()}
        self.curve.append({"step": self.step, "mean": round(mean, 4), **found})
        return mean

    def _all(self, way: str) -> Callable[[list[Task], SupportBatch], dict[str, torch.Tensor]]:
        """What sees all tasks in one way: `"own"` or `"proposed"`."""

        def adapters(tasks: list[Task], support: SupportBatch) -> dict[str, torch.Tensor]:
            own, proposed = (torch.full((len(tasks),), name == way) for name in ("own", "proposed"))
            numbers = [self.sources.index(source_of(task.group)) if way == "own" else 0 for task in tasks]
            return self.seen_by(numbers, own, proposed, self.read(support, proposed))

        return adapters

    def result(self) -> tuple[dict[str, torch.Tensor], RidgeHead, TaskEncoder]:
        """The best adapter, key -> `(1, *shape)`, its head and its encoder; the last ones if they were never validated."""
        kept = self.best or {name: value.detach() for name, value in self._learnt().items()}
        scalars = {name: kept.get(name, value).item() for name, value in self.scalars.items()}
        encoder = copy.deepcopy(self.encoder).eval()
        if self.own_share or self.proposed_share:
            encoder.load_state_dict({name: kept[ENCODER + name] for name in encoder.state_dict()})
        return {key: kept[key] for key in self.tensors}, RidgeHead(**scalars, feature_norm=self.norm), encoder

    def save(self, path: Path, made: dict) -> None:
        """Write all that training goes on from, and what it was made with, whole or not at all."""
        state = {f"now.{name}": value.detach() for name, value in self._learnt().items()}
        state |= {f"best.{name}": value for name, value in self.best.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"moment.{number}.{name}": value for name, value in moments.items()}
        told = {"step": self.step, "curve": self.curve, "norm": self.norm, "made": made}
        content = save({name: value.contiguous() for name, value in state.items()}, {"state": json.dumps(told)})
        write_file(path, lambda file: file.write(content))

    def load(self, path: Path) -> dict:
        """Go on from what [`SharedStart.save`] wrote; returned is what it was made with."""
        state, told = read_tensors(path, "state", self.stacked.device)
        with torch.no_grad():
            for name, value in self._learnt().items():
                value.copy_(state[f"now.{name}"])
        self.best = {name.removeprefix("best."): value for name, value in state.items() if name.startswith("best.")}
        moments: dict[int, dict] = {}
        for name, value in state.items():
            if name.startswith("moment."):
                _, number, kind = name.split(".")
                moments.setdefault(int(number), {})[kind] = value
        kept = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": kept["param_groups"]})
        self.step, self.curve, self.norm = told["step"], told["curve"], told["norm"]
        self.schedule.last_epoch = self.step
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs):
            group["lr"] = rate * self._rate(self.step)
        return told["made"]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.stacked.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def _learnt(self) -> dict[str, torch.Tensor]:
        learnt: dict[str, torch.Tensor] = self.tensors | ({} if self.stacked.backbone.is_causal_lm else self.scalars)
        if self.own_share or self.proposed_share:
            learnt |= {ENCODER + name: value for name, value in self.encoder.named_parameters()}
        return learnt

    def _rate(self, step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / self.num_steps)) / 2
        return min(1.0, (step + 1) / WARMUP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def train_shared_adapter(
    start: SharedStart,
    validation: tuple[EncodedExamples, dict[str, list[Task]]] | None = None,
    validation_steps: int = 200,
    checkpoint: Path | None = None,
    made: dict | None = None,
    on_step: Callable[[float], None] | None = None,
) -> tuple[dict[str, torch.Tensor], RidgeHead, TaskEncoder]:
    """Train a shared start to its end, from a checkpoint if there is one.

    Every trajectory starts here, so that all of them lie in one basis, and it is the baseline that a generator has to
    beat: one adapter for everybody.

    Args:
        start ([`SharedStart`]): What is trained.
        validation (`tuple`, *optional*): A table of held-out examples and, for each kind, tasks of it; the best
            adapter on the mean of the kinds is returned.
        validation_steps (`int`, *optional*, defaults to 200): Steps from one validation and checkpoint to the next.
        checkpoint (`Path`, *optional*): The file to keep; an interrupted run goes on from it to the same result.
        made (`dict`, *optional*): What the checkpoint must have been made with.
        on_step (`Callable`, *optional*): Called with each step's loss.

    Returns:
        The adapter, key -> `(1, *shape)`, its [`RidgeHead`], and the [`TaskEncoder`] that was trained beside it.

    Raises:
        `ValueError`: when the checkpoint is damaged or was made with something else, or the loss is not finite.

    Example: `tensors, head, encoder = train_shared_adapter(SharedStart(stacked, examples, sampler, sources))`
    """
    if checkpoint is not None and checkpoint.exists():
        if different := differences(start.load(checkpoint), made or {}):
            raise ValueError(
                f"{checkpoint} was made with other settings: {'; '.join(different)}. Choose another output_dir, "
                "or the same settings."
            )
    while start.step < start.num_steps:
        loss = start.train_step()
        if not math.isfinite(loss):
            raise ValueError(f"The shared start diverged at step {start.step}: lower shared_learning_rate.")
        if on_step is not None:
            on_step(loss)
        if start.step % validation_steps == 0 or start.step == start.num_steps:
            if validation is not None:
                start.validate(*validation)
            if checkpoint is not None:
                start.save(checkpoint, made or {})
    return start.result()
