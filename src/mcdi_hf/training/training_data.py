"""What meta-training learns from and is judged on: trajectories, fresh tasks, and tasks of domains that are held out."""

from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..data.augmentation import augmented_views
from ..data.crossed import identities
from ..data.encoded import EncodedExamples
from ..data.kinds import tasks_of_kind
from ..data.sources import Source, domains_of, inputs_of, load_table, sources_of, training_table
from ..data.stacks import stack_sampler
from ..data.tasks import LabelledRows, check_disjoint
from ..trajectories.dataset import load_task_encoder, load_trajectories, local_targets
from .arguments import MCDiTrainingArguments


class TrainingData:
    """The trajectories, their codec and the task encoder beside it; a table of training examples and a sampler of fresh
    tasks of it; a table of held-out examples and the validation tasks of each kind. `sources` say where the trajectories'
    data sets are now; a `backbone` that is not given is loaded by its name."""

    def __init__(
        self,
        args: MCDiTrainingArguments,
        trajectories: str,
        sources: list[Source] | None,
        backbone: FrozenBackbone | None,
        accelerator: Accelerator,
    ) -> None:
        self.trajectories, self.description, self.codec = load_trajectories(trajectories)
        if backbone is None:
            base_model = self.codec.config.base_model
            backbone = FrozenBackbone.of(base_model, args.pretrained_model_name_or_path)
        backbone.model.to(accelerator.device)
        self.codec.check_backbone(backbone)
        self.targets = local_targets(self.trajectories, self.codec)
        self.codec.fit_scales(self.targets[:, -1])
        self.task_encoder = load_task_encoder(trajectories)
        self.task_encoder.rescale(self.codec.filled / self.codec.std)  # from z to tokens
        self.codec.to(accelerator.device)
        self.stacked = StackedLora(backbone, self.codec.layout)
        sources = sources_of(self.description, sources or args.dataset_name)
        train = training_table(self.description, sources)[0]
        drawn = self.description["tasks"] | {"shots": args.shots, "queries_per_class": args.queries_per_class}
        self.rows = LabelledRows(train, "label", "group", None, "domain", drawn["min_rows"])
        inputs = inputs_of(train)
        # not the tasks of the shared start
        self.sampler = stack_sampler(self.rows, sources, drawn, inputs, args.seed + 3)
        self.domains = self._validation_domains(args, sources)
        held_out = load_table(sources, ["train"], self.domains)[0]
        held_rows = LabelledRows(held_out, "label", "group", domain_column="domain")
        check_disjoint(train=self.rows, validation=held_rows)
        kind_of = {"seed": args.seed + 2, "count": args.num_validation_episodes}
        if not backbone.reads_images:
            kind_of["identities"] = identities(inputs_of(held_out))
        queries = args.validation_queries
        self.validation = {
            kind: tasks_of_kind(kind, held_rows, queries=queries, **kind_of) for kind in args.validation_tasks
        }
        with accelerator.autocast():
            self.train = self._encode(train, args.cache_dir, args.num_views)
            self.held_out = self._encode(held_out, args.cache_dir)

    def _encode(self, table: Dataset, cache_dir: Path | None, num_views: int = 1) -> EncodedExamples:
        views = augmented_views(inputs_of(table), num_views)
        return self.stacked.encode(views, num_views=num_views, cache_dir=cache_dir)

    def _validation_domains(self, args: MCDiTrainingArguments, sources: list[Source]) -> list[str]:
        domains = args.validation_domains
        if domains is None:
            domains = [domain for domain in domains_of(sources) if domain not in self.description["train_domains"]]
        if not domains:
            raise ValueError("No domain is left to validate on: collect again with some in held_out_domains.")
        return domains
