"""What meta-training learns from and is judged on: trajectories, fresh tasks, and tasks of domains that are held out."""

import copy
import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from ..adapters.codec import AdapterCodec
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..data.augmentation import augmented_views
from ..data.sources import Source, domains_of, inputs_of, load_table, sources_of, training_table
from ..data.tasks import EpisodeSampler, LabelledRows, Task, check_disjoint
from ..trajectories.dataset import final_adapters, load_trajectories
from .arguments import MCDiTrainingArguments
from .batches import TrajectoryBatches


class EncodedTable:
    """A table of examples as the backbone sees it, below the adapted layers and through the mean adapter.

    Args:
        table (`Dataset`): The examples, see [`load_table`].
        stacked ([`StackedLora`]), codec ([`AdapterCodec`]): The backbone and the mean adapter.
        cache_dir (`Path`, *optional*): Keeps what the frozen lower layers make.
        num_views (`int`, *optional*, defaults to 1): Views of every example to draw from.
        support_views (`int`, *optional*, defaults to 1): Views that an example's features are the mean of.

    Attributes:
        examples ([`EncodedExamples`]): All views of them.
        features (`torch.Tensor` of shape `(num_views * examples, feature_dim)`): See [`EncodedTable.features_under`].
    """

    def __init__(
        self,
        table: Dataset,
        stacked: StackedLora,
        codec: AdapterCodec,
        cache_dir: Path | None = None,
        num_views: int = 1,
        support_views: int = 1,
    ) -> None:
        count = max(num_views, support_views)
        views = augmented_views(inputs_of(table), count)
        self.examples = stacked.encode(views, num_views=count, cache_dir=cache_dir)
        self.num_views, self.support_views, self.stacked = num_views, support_views, stacked
        self.features = self.features_under(codec.mean_adapter())

    def features_under(self, tensors: dict[str, torch.Tensor], rows: torch.Tensor | None = None) -> torch.Tensor:
        """What a head is imprinted from, and a condition made of, under one adapter.

        Args:
            tensors (`dict[str, torch.Tensor]`): The adapter, key -> `(1, *shape)`.
            rows (`torch.Tensor` of shape `(n,)`, *optional*): The examples wanted, as they are; without it all of them
                and, behind them, all their views.

        Returns:
            `torch.Tensor` of shape `(n, feature_dim)` or `(num_views * examples, feature_dim)`. With several support
            views it is their mean, whichever view a row is of.
        """
        tensors = {key: value.to(self.stacked.device) for key, value in tensors.items()}
        plain = torch.arange(len(self.examples)) if rows is None else rows
        count = self.num_views if self.support_views == 1 and rows is None else self.support_views
        views = torch.cat([plain + view * len(self.examples) for view in range(count)])
        features = self.stacked.features_of_all(tensors, self.examples, views)
        if self.support_views == 1:
            return features
        mean = features.unflatten(0, (count, -1)).mean(dim=0)
        return mean if rows is not None else mean.repeat(self.num_views, 1)


class TrainingData:
    """The trajectories, with a condition for each drawn from their source; fresh tasks; validation tasks.

    Args:
        args ([`MCDiTrainingArguments`]): The run's.
        trajectories (`str`): A folder or Hub id.
        sources (`list[Source]`, *optional*): Where the trajectories' data sets are now.
        backbone ([`FrozenBackbone`], *optional*): A loaded one; by default it is loaded by its name.
        device (`torch.device`): Where the backbone runs.
    """

    def __init__(
        self,
        args: MCDiTrainingArguments,
        trajectories: str,
        sources: list[Source] | None,
        backbone: FrozenBackbone | None,
        device: torch.device,
    ) -> None:
        rows, self.description = load_trajectories(trajectories)
        settings, base_model = self.description["settings"], self.description["base_model"]
        if backbone is None:
            backbone = FrozenBackbone.of(base_model, args.pretrained_model_name_or_path)
        backbone.model.to(device)
        lora_config, scale = self.description["lora_config"], settings["imprint_scale"]
        self.codec = AdapterCodec(self.description["layout"], lora_config, base_model, scale)
        self.codec.check_backbone(backbone)
        self.stacked = StackedLora(backbone, self.codec.layout)
        sources = sources_of(self.description, sources or args.dataset_name)
        train, spans = training_table(self.description, sources)
        self.rows = LabelledRows(train, "label", "group", spans["train"], "domain")
        splits = ["train", args.query_split] if args.query_split else ["train"]
        known = domains_of(sources)
        trained = self.description["train_domains"] or known  # early descriptions leave it out for all of them
        domains = args.validation_domains or [domain for domain in known if domain not in trained]
        if not domains:
            raise ValueError(f"The trajectories are of all domains, {known}: none is left to validate on.")
        held_out, spans = load_table(sources, splits, domains)
        held_rows = [LabelledRows(held_out, "label", "group", spans[split], "domain") for split in splits]
        check_disjoint(train=self.rows, validation=held_rows[0])
        self.codec.fit_matrices(final_adapters(rows, self.codec.layout))
        # The condition is what the head reads under the mean adapter, so that comes first.
        views = args.support_views
        self.train = EncodedTable(train, self.stacked, self.codec, args.cache_dir, args.num_views, views)
        self.held_out = EncodedTable(held_out, self.stacked, self.codec, args.cache_dir, support_views=views)
        # Batches are made on the CPU, where the codec is.
        features, shots = self.train.features.cpu(), tuple(args.shots)
        batch_size, noise = args.train_batch_size, args.condition_noise
        self.batches = TrajectoryBatches(rows, features, self.codec, shots, batch_size, noise)
        self.batches.fit_head(np.random.default_rng(args.seed))
        ways, queries = tuple(self.description["tasks"]["ways"]), args.queries_per_class
        self.tasks = EpisodeSampler(self.rows, ways, shots, queries, args.seed + 3)  # that no trajectory is of
        self.validation = {
            kind: tasks_of_kind(kind, *held_rows, seed=args.seed + 2, count=args.num_validation_episodes)
            for kind in args.validation_tasks
        }


def tasks_of_kind(
    kind: str, rows: LabelledRows, query_rows: LabelledRows | None = None, queries: int = 5, *, seed: int, count: int
) -> list[Task]:
    """Tasks of one kind, `WAYSxSHOTS` of any group or `GROUP:WAYSxSHOTS` of one."""
    group, _, size = kind.rpartition(":")
    if not re.fullmatch(r"\d+x\d+", size):
        raise ValueError(f"The kind of tasks {kind!r} is unknown: expected WAYSxSHOTS or GROUP:WAYSxSHOTS.")
    ways, shots = (int(number) for number in size.split("x"))
    if group:
        rows, query_rows = (own and _only(own, group, kind) for own in (rows, query_rows))
    sampler = EpisodeSampler(rows, (ways, ways), (shots, shots), queries, seed, query_rows)
    return [sampler[number] for number in range(count)]


def _only(rows: LabelledRows, group: str, kind: str) -> LabelledRows:
    """The rows of one group, whatever the others have too few of."""
    if group not in rows.groups:
        raise ValueError(f"There are no tasks {kind!r}: expected one of the groups {list(rows.groups)}.")
    own = copy.copy(rows)
    own.groups = {group: rows.groups[group]}
    return own
