"""Weight preparation as the scripts need it: what there is to set, and what a run consists of."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from data import (
    BACKBONE_ID,
    Source,
    inputs_of,
    installed_backbone,
    load_table,
    read_mixture,
    training_table,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from mcdi_hf import (
    AdapterCodec,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    StackedLora,
    TrajectorySettings,
    package_versions,
    train_shared_adapter,
)
from mcdi_hf.utils.files import write_file
from mcdi_hf.data.tasks import check_disjoint
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.trajectories.budget import bytes_per_task, stack_size_for
from mcdi_hf.trajectories.collect import GAUGES
from mcdi_hf.trajectories.description import differences


def add_data_arguments(group) -> None:
    group.add_argument("--dataset_name", help="a Hub id or a local folder, with named classes")
    group.add_argument("--input_columns", nargs="+", default=["text"], help="one of texts or images, two of sentences")
    group.add_argument("--label_column", default="label")
    group.add_argument("--group_column", help="tasks take their classes from one group")
    group.add_argument("--domain_column", help="rows are held out by domain; by default the groups are the domains")
    group.add_argument("--mixture", type=Path, help="several sources, as in examples/mixtures/reviews.json")
    group.add_argument("--mixture_root", type=Path, help="a folder that holds the data sets of the mixture")
    group.add_argument(
        "--train_domains", nargs="+", help="the domains to train on; by default all that are not held out"
    )
    group.add_argument("--held_out_domains", nargs="+", default=[], help="the domains of validation and test tasks")
    group.add_argument("--rotations", action="store_true", help="images turned by 90, 180, 270 degrees: more classes")
    group.add_argument("--query_split", help="where tasks are judged; by default on rows that their support leaves")
    group.add_argument("--num_tasks", type=int, default=300)
    group.add_argument("--ways", type=int, nargs=2, default=[5, 15], help="least and greatest number of classes")
    group.add_argument("--examples_per_class", type=int, nargs=2, default=[100, 100], help="what the optimiser sees")
    group.add_argument("--queries_per_class", type=int, default=10, help="what an adapter is judged on")
    group.add_argument("--num_views", type=int, default=1, help="views of an example, all but the first augmented")


def add_adapter_arguments(group) -> None:
    group.add_argument("--pretrained_model_name_or_path", help="by default the wheel's all-MiniLM-L6-v2")
    group.add_argument("--base_model_name", help="the name that adapters record it by; by default the same")
    group.add_argument(
        "--pooling", choices=["mean", "default", "last_token"], default="mean", help="what a head reads"
    )
    group.add_argument("--max_length", type=int, default=64, help="longer texts are cut to so many tokens")
    group.add_argument("--no_head", action="store_true", help="LoRA only: the head stays as imprinted")
    group.add_argument("--rank", type=int, default=4)
    group.add_argument("--lora_alpha", type=int, default=4)
    group.add_argument("--target_modules", nargs="+", default=["query", "value"])
    group.add_argument("--layers", type=int, nargs="+", default=[4, 5], help="indices of the adapted layers")
    group.add_argument("--token_dim", type=int, default=768)
    group.add_argument("--cache_dir", type=Path, help="keep what the frozen lower layers make here, not in memory")


def add_optimiser_arguments(group) -> None:
    group.add_argument("--shared_steps", type=int, default=200, help="episodes that the shared start is trained on")
    group.add_argument("--shared_shots", type=int, nargs=2, default=[1, 5], help="examples a class of their support")
    group.add_argument("--shared_learning_rate", type=float, default=1e-3)
    group.add_argument("--train_batch_size", type=int, default=16, help="examples a task and a step")
    group.add_argument("--learning_rate", type=float, default=1e-3)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--lr_scheduler", default="linear")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--max_train_steps", type=int, default=24, help="steps of a task's optimiser")
    group.add_argument("--num_targets", type=int, default=3, help="local targets kept of a trajectory")
    group.add_argument("--sam_rho", type=float, default=0.0, help="sharpness-aware minimisation's step; 0 is without")
    group.add_argument("--gauge", choices=GAUGES, default="shared_start", help="what makes factors comparable")


class Collection:
    """What a run needs: the tasks, the adapted backbone, and a description of everything that the result depends on."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        if args.mixture:
            sources = read_mixture(args.mixture, args.mixture_root)
        else:
            columns = args.label_column, tuple(args.input_columns), args.group_column, args.domain_column
            sources = [Source(args.dataset_name, *columns)]
        where = {
            "sources": [asdict(source) for source in sources],
            "splits": ["train", args.query_split] if args.query_split else ["train"],
            "train_domains": args.train_domains or self._other_domains(sources),
            "rotations": args.rotations,
        }
        self.table, spans = training_table(where)
        self.rows = LabelledRows(self.table, "label", "group", spans["train"], "domain")
        if args.held_out_domains:
            held_out = load_table(sources, ["train"], args.held_out_domains)[0]
            check_disjoint(
                training=self.rows, held_out=LabelledRows(held_out, "label", "group", domain_column="domain")
            )
        query_rows = LabelledRows(self.table, "label", "group", spans[args.query_split]) if args.query_split else None
        self.sampler = EpisodeSampler(
            self.rows,
            tuple(args.ways),
            tuple(args.examples_per_class),
            args.queries_per_class,
            args.seed + 1,
            query_rows,
        )
        self.stacked, self.codec = self._adapted_backbone(device)
        self.description = {
            **where,
            "tasks": {key: getattr(args, key) for key in ("ways", "examples_per_class", "queries_per_class", "seed")},
            "num_views": args.num_views,
            "shared_start": {
                "steps": args.shared_steps,
                "shots": args.shared_shots,
                "learning_rate": args.shared_learning_rate,
            },
            "lora_config": self.codec.config.lora_config,
            "base_model": self.codec.config.base_model,
            "versions": package_versions(),
        }

    def _other_domains(self, sources: list[Source]) -> list[str]:
        known = load_table(sources, ["train"], None)[0].features["domain"].names
        if unknown := sorted(set(self.args.held_out_domains) - set(known)):
            raise ValueError(f"There are no domains {unknown} to hold out: expected some of {known}.")
        return [domain for domain in known if domain not in self.args.held_out_domains]

    def _adapted_backbone(self, device: torch.device) -> tuple[StackedLora, AdapterCodec]:
        args = self.args
        name = args.pretrained_model_name_or_path or installed_backbone()
        remembered = args.base_model_name or args.pretrained_model_name_or_path or BACKBONE_ID
        backbone = FrozenBackbone.from_pretrained(name, args.pooling, remembered, args.max_length, dtype=torch.float32)
        backbone.model.to(device)
        has_head = not (args.no_head or backbone.is_causal_lm)
        text_type = "SEQ_CLS" if has_head and not backbone.reads_images else None  # PEFT has no type for images
        lora_config = LoraConfig(
            task_type="CAUSAL_LM" if backbone.is_causal_lm else text_type,
            r=args.rank,
            lora_alpha=args.lora_alpha,
            target_modules=args.target_modules,
            layers_to_transform=args.layers,
            modules_to_save=[backbone.head_name] if has_head and text_type is None else None,
        )
        codec = AdapterCodec.from_backbone(backbone, lora_config, token_dim=args.token_dim)
        return StackedLora(backbone, codec.layout), codec

    def encode(self, show: bool) -> None:
        """Run every example through the frozen lower layers, once for each view."""
        views = augmented_views(inputs_of(self.table), self.args.num_views, self.args.seed)
        with tqdm(total=len(views), desc="lower layers", unit="example", disable=not show) as bar:
            self.examples = self.stacked.encode(
                views, num_views=self.args.num_views, on_batch=bar.update, cache_dir=self.args.cache_dir
            )

    def settings(self, imprint_scale: float) -> TrajectorySettings:
        args = self.args
        return TrajectorySettings(
            num_steps=args.max_train_steps,
            num_targets=args.num_targets,
            batch_size=args.train_batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.adam_weight_decay,
            lr_scheduler=args.lr_scheduler,
            lr_warmup_steps=args.lr_warmup_steps,
            sam_rho=args.sam_rho,
            gauge=args.gauge,
            imprint_scale=imprint_scale,
            seed=args.seed,
        )

    def start_features(self, start: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """What the head reads of every example under the start, for imprinting; words need none."""
        if self.stacked.backbone.is_causal_lm:
            return None
        return self.stacked.features_of_all(start, self.examples)

    def stack_size(self, settings: TrajectorySettings) -> tuple[int, int]:
        """The number of tasks in a stack, and the bytes that each of them takes."""
        tasks = [self.sampler[number] for number in range(min(self.args.num_tasks, 100))]
        largest = max(tasks, key=lambda task: len(task.classes))
        per_task = bytes_per_task(self.stacked, self.examples, largest, settings)
        return min(self.args.max_stack_size, stack_size_for(int(self.args.memory_budget * 2**30), per_task)), per_task

    def shared_start(self, accelerator: Accelerator) -> tuple[dict[str, torch.Tensor], float]:
        """Train the shared start on the main process, or read the one that an earlier run left."""
        path = self.args.output_dir / "shared_adapter.safetensors"
        with accelerator.main_process_first():
            if not path.exists():
                self._train_shared_start(path)
            with safe_open(path, "pt", device=str(self.stacked.device)) as file:
                made = file.metadata()["made"]
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        different = differences(json.loads(made), json.loads(json.dumps(self.description)))
        if different:
            raise ValueError(f"{path} was made otherwise: {'; '.join(different)}. Choose another --output_dir.")
        return tensors, tensors.pop("imprint_scale").item()

    def _train_shared_start(self, path: Path) -> None:
        args = self.args
        sampler = EpisodeSampler(self.rows, tuple(args.ways), tuple(args.shared_shots), 5, args.seed)
        bar = tqdm(total=args.shared_steps, desc="shared start")

        def show(_: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        tensors, scale = train_shared_adapter(
            self.stacked,
            self.examples,
            sampler,
            args.shared_steps,
            args.shared_learning_rate,
            seed=args.seed,
            on_step=show,
        )
        bar.close()
        tensors = {key: value.cpu() for key, value in tensors.items()} | {"imprint_scale": torch.tensor(scale)}
        # Not `save_file`, whose error on a full disk is no OSError.
        content = save(tensors, {"made": json.dumps(self.description)})
        write_file(path, lambda file: file.write(content))

    def data_bytes(self) -> int:
        """The size of the data set on disk."""
        return 4 * self.codec.layout.width(self.args.ways[1]) * (self.args.num_targets + 1) * self.args.num_tasks
