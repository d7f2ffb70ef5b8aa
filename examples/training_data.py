"""What meta-training learns from and is judged on: trajectories, fresh tasks, and tasks of domains that are held out."""

import argparse
from pathlib import Path

import numpy as np
import torch
from data import inputs_of, installed_backbone, load_table, sources_of, training_table
from datasets import Dataset

from mcdi_hf import AdapterCodec, EpisodeSampler, FrozenBackbone, LabelledRows, StackedLora, Task, load_trajectories
from mcdi_hf.tasks import check_disjoint
from mcdi_hf.training.conditions import TrajectoryBatches
from mcdi_hf.trajectories.augmentation import augmented_views
from mcdi_hf.trajectories.dataset import final_adapters


class Split:
    """A table of examples as the backbone sees it, below the adapted layers and through the mean adapter."""

    def __init__(
        self,
        table: Dataset,
        stacked: StackedLora,
        codec: AdapterCodec,
        cache_dir: Path | None = None,
        num_views: int = 1,
    ) -> None:
        views = augmented_views(inputs_of(table), num_views)
        self.examples = stacked.encode(views, num_views=num_views, cache_dir=cache_dir)
        mean = {key: value.to(stacked.device) for key, value in codec.mean_adapter().items()}
        self.features = stacked.features_of_all(mean, self.examples, torch.arange(len(views)))


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
        self.train = Split(train, self.stacked, self.codec, args.cache_dir, args.num_views)
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
        ways = tuple(self.description["tasks"]["ways"])
        self.tasks = EpisodeSampler(rows, ways, tuple(args.shots), args.queries_per_class, args.seed + 3)
        self.held_out = Split(held_out, self.stacked, self.codec, args.cache_dir)
        self.validation = {
            kind: episodes(kind, held_rows, *query_rows, seed=args.seed + 2, count=args.num_validation_episodes)
            for kind in args.validation_tasks
        }


def episodes(
    kind: str, rows: LabelledRows, query_rows: LabelledRows | None = None, queries: int = 5, *, seed: int, count: int
) -> list[Task]:
    """Tasks of one kind, `WAYSxSHOTS` of any group or `GROUP:WAYSxSHOTS` of one."""
    group, _, size = kind.rpartition(":")
    ways, shots = (int(number) for number in size.split("x"))
    sampler = EpisodeSampler(rows, (ways, ways), (shots, shots), queries, seed, query_rows)
    if group:
        if group not in sampler.groups:
            raise ValueError(f"There are no tasks {kind!r}: expected one of the groups {sampler.groups}.")
        sampler.groups = [group]
    return [sampler[number] for number in range(count)]
