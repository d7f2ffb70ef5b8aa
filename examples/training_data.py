"""What meta-training learns from and is judged on: trajectories, fresh tasks, and tasks of domains that are held out."""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from data import inputs_of, installed_backbone, load_table, sources_of, training_table
from datasets import Dataset

from mcdi_hf import AdapterCodec, EpisodeSampler, FrozenBackbone, LabelledRows, StackedLora, Task, load_trajectories
from mcdi_hf.data.tasks import check_disjoint
from mcdi_hf.training.batches import TrajectoryBatches
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.trajectories.dataset import final_adapters


class Split:
    """A table of examples as the backbone sees it, below the adapted layers and through the mean adapter.

    Args:
        table (`Dataset`): The examples.
        stacked (`StackedLora`): The backbone.
        codec (`AdapterCodec`): With the mean adapter.
        cache_dir (`Path`, *optional*): Keeps what the frozen lower layers make.
        num_views (`int`, *optional*, defaults to 1): Views of every example to draw from.
        support_views (`int`, *optional*, defaults to 1): Views that the features of an example are the mean of, as in
            [`MCDiPipeline`].
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


class Data:
    """The trajectories, with a condition for each drawn from their source; fresh tasks; validation tasks.

    Args:
        args (`argparse.Namespace`): Those of `train_mcdi.py`.
        device (`torch.device`): Where the backbone runs.
    """

    def __init__(self, args: argparse.Namespace, device) -> None:
        name = args.pretrained_model_name_or_path or installed_backbone()
        trajectories, self.description = load_trajectories(args.trajectories)
        settings, base_model = self.description["settings"], self.description["base_model"]
        backbone = FrozenBackbone.of(base_model, name)
        backbone.model.to(device)
        self.codec = AdapterCodec(
            self.description["layout"], self.description["lora_config"], base_model, settings["imprint_scale"]
        )
        self.codec.check_backbone(backbone)
        self.stacked = StackedLora(backbone, self.codec.layout)
        train, spans = training_table(self.description, args.dataset_name)
        rows = LabelledRows(train, "label", "group", spans["train"], "domain")
        sources = sources_of(self.description, args.dataset_name)
        splits = ["train", args.query_split] if args.query_split else ["train"]
        held_out, held_spans = load_table(sources, splits, args.validation_domains)
        held_rows, *query_rows = (
            LabelledRows(held_out, "label", "group", held_spans[split], "domain") for split in splits
        )
        check_disjoint(train=rows, validation=held_rows)
        self.codec.fit_matrices(final_adapters(trajectories, self.codec.layout))
        # The condition is what the head reads under the mean adapter, so that comes first.
        self.train = Split(train, self.stacked, self.codec, args.cache_dir, args.num_views, args.support_views)
        # Batches are made on the CPU, where the codec is.
        self.batches = TrajectoryBatches(
            trajectories,
            self.train.features.cpu(),
            self.codec,
            tuple(args.shots),
            args.train_batch_size,
            args.condition_noise,
        )
        self.batches.fit_head(np.random.default_rng(args.seed))
        self.rows = rows
        self.held_out = Split(held_out, self.stacked, self.codec, args.cache_dir, support_views=args.support_views)
        self.validation = {
            kind: episodes(kind, held_rows, *query_rows, seed=args.seed + 2, count=args.num_validation_episodes)
            for kind in args.validation_tasks
        }

    def fresh_tasks(self, shots: tuple[int, int], queries: int, seed: int) -> EpisodeSampler:
        """Tasks of training domains that no trajectory is of."""
        return EpisodeSampler(self.rows, tuple(self.description["tasks"]["ways"]), shots, queries, seed)


def episodes(
    kind: str, rows: LabelledRows, query_rows: LabelledRows | None = None, queries: int = 5, *, seed: int, count: int
) -> list[Task]:
    """Tasks of one kind, `WAYSxSHOTS` of any group or `GROUP:WAYSxSHOTS` of one."""
    group, _, size = kind.rpartition(":")
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
