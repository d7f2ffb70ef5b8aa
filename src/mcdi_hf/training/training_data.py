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
    """A table of examples as the backbone sees it: below the adapted layers, in `num_views` views of each to draw from, and
    through the mean adapter, as features `(num_views * examples, feature_dim)` that a head is imprinted from, and a
    condition made of. With several `support_views` they are the mean of so many views, see [`MCDiPipeline`]. `cache_dir`
    keeps what the frozen lower layers make.
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
        seen = num_views if support_views == 1 else support_views
        mean_adapter = {key: value.to(stacked.device) for key, value in codec.mean_adapter().items()}
        features = stacked.features_of_all(mean_adapter, self.examples, torch.arange(seen * len(self.examples)))
        if support_views > 1:  # the same for a row of any view
            features = features.unflatten(0, (seen, -1)).mean(dim=0).repeat(num_views, 1)
        self.features = features


class TrainingData:
    """The trajectories, with a condition for each drawn from their source; fresh tasks; validation tasks. `sources`
    say where the trajectories' data sets are now; a `backbone` that is not given is loaded by its name."""

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
        self.domains = args.validation_domains
        if self.domains is None:
            known = domains_of(sources)
            trained = self.description["train_domains"] or known  # None is all, in early descriptions
            self.domains = [domain for domain in known if domain not in trained]
        if not self.domains:
            raise ValueError("No domain is left to validate on: collect again with some in held_out_domains.")
        held_out, spans = load_table(sources, splits, self.domains)
        held_rows = [LabelledRows(held_out, "label", "group", spans[split], "domain") for split in splits]
        check_disjoint(train=self.rows, validation=held_rows[0])
        ways, shots, queries = tuple(self.description["tasks"]["ways"]), tuple(args.shots), args.queries_per_class
        self.tasks = EpisodeSampler(self.rows, ways, shots, queries, args.seed + 3)  # not those of the trajectories
        self.validation = {
            kind: tasks_of_kind(kind, *held_rows, seed=args.seed + 2, count=args.num_validation_episodes)
            for kind in args.validation_tasks
        }
        self.codec.fit_matrices(final_adapters(rows, self.codec.layout))
        # The condition is what the head reads under the mean adapter, so that comes first.
        views = args.support_views
        self.train = EncodedTable(train, self.stacked, self.codec, args.cache_dir, args.num_views, views)
        self.held_out = EncodedTable(held_out, self.stacked, self.codec, args.cache_dir, support_views=views)
        # Batches are made on the CPU, where the codec is.
        features, noise = self.train.features.cpu(), args.condition_noise
        self.batches = TrajectoryBatches(rows, features, self.codec, shots, args.train_batch_size, noise)
        self.batches.fit_head(np.random.default_rng(args.seed))


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
    try:
        sampler = EpisodeSampler(rows, (ways, ways), (shots, shots), queries, seed, query_rows)
    except ValueError as error:
        raise ValueError(f"There are no tasks of the kind {kind!r}: {error}") from error
    return [sampler[number] for number in range(count)]


def _only(rows: LabelledRows, group: str, kind: str) -> LabelledRows:
    """The rows of one group, whatever the others have too few of."""
    if group not in rows.groups:
        raise ValueError(f"There are no tasks {kind!r}: expected one of the groups {list(rows.groups)}.")
    own = copy.copy(rows)
    own.groups = {group: rows.groups[group]}
    return own
