"""Weight preparation from data sets to a trajectory data set."""

import json
import shutil
import time
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, Image
from peft import LoraConfig
from safetensors.torch import save
from tqdm.auto import tqdm

from ..adapters.codec import AdapterCodec
from ..adapters.head import RidgeHead
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..backbones.layers import modules_to_adapt
from ..data.augmentation import augmented_views
from ..data.crossed import identities
from ..data.encoded import EncodedExamples
from ..data.kinds import tasks_of_kind
from ..data.sources import HELD_OUT_CLASSES, Source, domains_of, inputs_of, load_table, training_table
from ..data.stacks import stack_sampler
from ..data.tasks import LabelledRows, Task, check_disjoint
from ..models.task_encoder import TaskEncoder
from ..utils.files import read_tensors, write_file, write_folder
from ..utils.run_folder import hold_folder
from .arguments import TrajectoryArguments
from .collect import TaskStack, collect_trajectories
from .description import differences, package_versions, read_encoder
from .folder import TASK_ENCODER, TrajectoryFolder
from .shared import SharedStart, source_of, train_shared_adapter


LONGEST_WAIT = timedelta(days=7)  # of one process for another; PyTorch's own is some minutes


class TrajectoryCollector:
    """Trains a shared start, optimises an adapter for each of many tasks of the `sources`, and writes the trajectory
    data set.

    A run that was interrupted continues where it stopped, on any number of processes of one launch: the shared start
    has checkpoints, and each stack of tasks is a file of its own.

    Example: `TrajectoryCollector(args, [Source("DATASET", group_column="domain")]).collect()`
    """

    def __init__(self, args: TrajectoryArguments, sources: list[Source]) -> None:
        self.args = args
        # No Accelerator, which would settle the precision of all that comes after it in this process. The others wait
        # for the main process while it trains the shared start.
        self.state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
        known = domains_of(sources)
        where = {
            "sources": [asdict(source) for source in sources],
            "splits": ["train"],
            "train_domains": args.train_domains or self._other_domains(known),
            "rotations": args.rotations,
            "exclude_texts_of": args.exclude_texts_of,
        }
        self.table, _, self.removed = training_table(where)
        self.rows = LabelledRows(self.table, "label", "group", None, "domain", args.min_rows)
        others = [domain for domain in known if domain not in where["train_domains"]]
        held_out = list(dict.fromkeys([*args.held_out_domains, *others]))
        if not held_out:
            raise ValueError(
                "Nothing is held out, so training could not tell which checkpoint is best: give held_out_domains, or "
                "held_out_classes for a data set without domains."
            )
        table = load_table(sources, ["train"], held_out)[0]
        check_disjoint(training=self.rows, held_out=LabelledRows(table, "label", "group", domain_column="domain"))
        chosen_on = args.validation_domains or [domain for domain in held_out if domain == HELD_OUT_CLASSES]
        self.validation = _validation(args, sources, chosen_on) if chosen_on else None
        drawn = {
            name: getattr(args, name)
            for name in ("ways", "shots", "queries_per_class", "two_way_share", "crossed_share", "seed")
        }
        inputs = inputs_of(self.table) if args.crossed_share else None
        self.sampler = stack_sampler(self.rows, sources, drawn, inputs, args.seed)
        # A trajectory's optimiser has steps of its own, with heads and queries, on what its query leaves.
        longer = LabelledRows(self.table, "label", "group", None, "domain", args.min_rows + args.queries_per_class)
        self.trajectory_sampler = stack_sampler(longer, sources, drawn | {"crossed_share": 0}, None, args.seed)
        self.stacked, self.codec = _adapted_backbone(args, self.state.device)
        self.description = {
            **where,
            "tasks": drawn | {"min_rows": args.min_rows},
            "num_views": args.num_views,
            "shared_start": {
                "steps": args.shared_steps,
                "tasks_per_step": args.tasks_per_step,
                "learning_rate": args.shared_learning_rate,
                "own_share": args.own_share,
                "proposed_share": args.proposed_share,
                "validation_domains": chosen_on or None,
                "validation_tasks": args.validation_tasks,
            },
            "examples_per_class": args.examples_per_class,
            "classes_per_task": args.classes_per_task,
            "lora_config": self.codec.config.lora_config,
            "base_model": self.codec.config.base_model,
            "versions": package_versions(),
        }

    def collect(self) -> TrajectoryFolder:
        """Make what is not there yet, and push it if that is asked for. To be called on every process.

        Returned is the whole data set in `OUTPUT_DIR/trajectories`. An `OSError` says that the disk is too small,
        that the folder cannot be written, or that another run writes to it; a `ValueError` that it holds what was
        made otherwise, with every difference.
        """
        args, state = self.args, self.state
        self._check_space()
        with hold_folder(args.output_dir, state):
            if self.removed and state.is_main_process:
                tqdm.write(f"{self.removed} training rows are texts of {', '.join(args.exclude_texts_of)}: left out.")
            examples = self._encode(self.table, args.num_views, "lower layers")
            tensors, head, encoder = self._shared_start(examples)
            self.codec.set_shared_adapter(tensors, head)
            self.codec.to(state.device)
            settings = args.settings()
            description = {**self.description, "settings": asdict(settings), "stack_size": args.stack_size}
            with state.main_process_first():
                place = args.output_dir / "trajectories"
                folder = TrajectoryFolder.create(place, self.codec, encoder, _as_json(description))
            state.wait_for_everyone()
            # The same stacks whatever was interrupted, and on however many processes.
            missing = sorted(set(range(args.num_tasks)) - folder.numbers)
            stacks = [list(stack) for _, stack in groupby(missing, lambda number: number // args.stack_size)]
            state.wait_for_everyone()  # every process has read what is there before one of them writes
            own = stacks[state.process_index :: state.num_processes]
            bar = self._bar("trajectories", sum(map(len, own)), "task")
            for numbers in own:
                ways, drawn = self._tasks(numbers[0] // args.stack_size)
                tasks = [drawn[number % args.stack_size] for number in numbers]
                folder.append(collect_trajectories(self.stacked, self.codec, examples, tasks, numbers, ways, settings))
                bar.update(len(numbers))
            bar.close()
            state.wait_for_everyone()
            if state.is_main_process:
                folder.finish()
                if args.push_to_hub:
                    folder.push_to_hub(args.hub_dataset_id)
            state.wait_for_everyone()
        return folder

    def dry_run(self) -> dict[str, str]:
        """Say what a run would make and take: passes of one stack are timed, and nothing is trained or written."""
        args, settings = self.args, self.args.settings()
        self._check_space()
        examples = self._encode(self.table, args.num_views, "lower layers")
        ways, tasks = self._tasks(0)
        stack = TaskStack(self.stacked, self.codec, examples, tasks, ways, settings)
        for attempt in range(3):  # the last one counts
            batches = stack.draw(1, [np.random.default_rng(attempt)] * len(tasks))
            began = time.perf_counter()
            stack.gradient(*batches)
            training = (time.perf_counter() - began) * settings.num_steps
        minutes = training / len(tasks) * args.num_tasks / 60
        layout, groups, width = self.codec.layout, self.rows.groups, self.codec.filled.sum()
        length = int(examples.lengths(torch.arange(len(examples))).max())
        held = examples.hidden_states.nbytes // 2**20
        return {
            "tasks": f"{args.num_tasks}, of {sum(map(len, groups.values()))} classes in {len(groups)} groups",
            "examples": f"{len(examples)} in {args.num_views} views, of at most {length} tokens, {held} MiB",
            "weights": f"{width} numbers in {len(layout.modules)} tokens, for {layout.numel} of LoRA",
            "data set": f"{self._data_bytes() / 1e6:.0f} MB",
            "estimated time": f"{minutes:.1f} min on one process, without the shared start",
        }

    def _tasks(self, stack: int) -> tuple[int, list[Task]]:
        """How many classes the steps of one stack of trajectories tell apart, and its tasks: each of most of the classes
        that its group has, with most of their rows, so that its trajectory is not that of a few of them."""
        args = self.args
        random = np.random.default_rng((args.seed, stack, 4))
        ways, draw = self.trajectory_sampler.draw_ways(random), self.trajectory_sampler.sampler.draw
        count = max(ways, args.classes_per_task)
        return ways, [draw(ways, args.examples_per_class, random, count) for _ in range(args.stack_size)]

    def _other_domains(self, known: list[str]) -> list[str]:
        held_out = self.args.held_out_domains
        if unknown := sorted(set(held_out) - set(known)):
            raise ValueError(f"There are no domains {unknown} to hold out: expected some of {known}.")
        return [domain for domain in known if domain not in [*held_out, HELD_OUT_CLASSES]]

    def _bar(self, description: str, total: int, unit: str) -> tqdm:
        return tqdm(total=total, desc=description, unit=unit, disable=not self.state.is_main_process, smoothing=0)

    def _encode(self, table: Dataset, num_views: int, name: str) -> EncodedExamples:
        """Run every example of a table through the frozen lower layers, once for each view."""
        args = self.args
        views = augmented_views(inputs_of(table), num_views, args.seed)
        bf16 = args.mixed_precision == "bf16"
        with (
            self._bar(name, len(views), "example") as bar,
            torch.autocast(self.state.device.type, torch.bfloat16, enabled=bf16),
        ):
            return self.stacked.encode(views, num_views=num_views, on_batch=bar.update, cache_dir=args.cache_dir)

    def _shared_start(self, examples: EncodedExamples) -> tuple[dict[str, torch.Tensor], RidgeHead, TaskEncoder]:
        """Train the shared start on the main process, or read the one that an earlier run left: the adapter and the head in
        one file, the encoder in a folder beside it."""
        path, place = (self.args.output_dir / name for name in ("shared_adapter.safetensors", TASK_ENCODER))
        made = _as_json(self.description)
        with self.state.main_process_first():
            if not path.exists():
                tensors, head, encoder = self._train_shared_start(examples, made)
                write_folder(place, encoder.save_pretrained, last=encoder.config_name)
                tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
                # one entry, since safetensors keep no order of several
                content = save(tensors, {"made": json.dumps({"made": made, "head": asdict(head)})})
                write_file(path, lambda file: file.write(content))
            tensors, told = read_tensors(path, "made")
        if different := differences(told["made"], made):
            raise ValueError(f"{path} was made otherwise: {'; '.join(different)}. Choose another output_dir.")
        return tensors, RidgeHead(**told["head"]), read_encoder(place)

    def _train_shared_start(
        self, examples: EncodedExamples, made: dict
    ) -> tuple[dict[str, torch.Tensor], RidgeHead, TaskEncoder]:
        args = self.args
        names = list(dict.fromkeys(map(source_of, self.rows.groups)))
        settings = args.shared_steps, args.tasks_per_step, args.shared_learning_rate, args.seed
        start = SharedStart(
            self.stacked,
            examples,
            self.sampler,
            names,
            *settings,
            args.own_share,
            args.proposed_share,
            args.mixed_precision,
        )
        validation = None
        if self.validation is not None:
            table, kinds = self.validation
            validation = self._encode(table, 1, "validation"), kinds
        with self._bar("shared start", args.shared_steps, "step") as bar:
            place = args.output_dir / "shared_checkpoint.safetensors"

            def on_step(loss: float) -> None:
                bar.update(start.step - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}", best=max((point["mean"] for point in start.curve), default=None))

            made_of = train_shared_adapter(start, validation, args.validation_steps, place, made, on_step)
        text = json.dumps(start.curve, indent=1)
        write_file(args.output_dir / "shared_curve.json", lambda file: file.write(text.encode()))
        return made_of

    def _data_bytes(self) -> int:
        """The size of the whole data set on disk."""
        return 4 * self.codec.filled.numel() * (self.args.num_targets + 1) * self.args.num_tasks

    def _check_space(self) -> None:
        """Refuse a disk that is too small for the data set before anything is computed."""
        folder = self.args.output_dir.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        there = sum(path.stat().st_size for path in (folder / "trajectories" / "data").glob("*.parquet"))
        free, needed = shutil.disk_usage(existing).free, self._data_bytes() - there
        if free < needed:
            left = f"{existing} has {free / 1e6:.0f} MB left"
            raise OSError(f"{left}; the trajectories need {needed / 1e6:.0f} MB more. Choose another output_dir.")


def _validation(
    args: TrajectoryArguments, sources: list[Source], domains: list[str]
) -> tuple[Dataset, dict[str, list[Task]]]:
    """The rows of the domains that the shared start is chosen on, and the tasks of every kind."""
    table = load_table(sources, ["train"], domains)[0]
    rows = LabelledRows(table, "label", "group", domain_column="domain")
    drawn = {"seed": args.seed + 1, "count": args.num_validation_episodes}
    if not isinstance(table.features["input"], Image):
        drawn["identities"] = identities(inputs_of(table))
    return table, {kind: tasks_of_kind(kind, rows, queries=15, **drawn) for kind in args.validation_tasks}


def _as_json(description: dict) -> dict:
    """A description as it is read from its file: lists for tuples."""
    return json.loads(json.dumps(description))


def _adapted_backbone(args: TrajectoryArguments, device: torch.device) -> tuple[StackedLora, AdapterCodec]:
    place = args.pretrained_model_name_or_path
    name = args.base_model_name or place
    own = {"name_or_path": name, "max_length": args.max_length, "dtype": torch.float32}
    if args.pooling is None:
        backbone = FrozenBackbone.suited(place, **own)
    else:
        backbone = FrozenBackbone.from_pretrained(place, args.pooling, **own)
    backbone.model.to(device)
    task_type = "CAUSAL_LM" if backbone.is_causal_lm else "SEQ_CLS"
    lora_config = LoraConfig(
        task_type=None if backbone.reads_images else task_type,  # PEFT has none for images
        r=args.rank,
        lora_alpha=args.lora_alpha,
        target_modules=modules_to_adapt(backbone, args.target_modules, args.layers),
        modules_to_save=[backbone.head_name] if backbone.reads_images else None,
    )
    codec = AdapterCodec.from_backbone(backbone, lora_config)
    return StackedLora(backbone, codec.layout), codec
