"""Weight preparation from data sets to a trajectory data set."""

import json
import shutil
import time
from dataclasses import asdict
from itertools import groupby

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from ..adapters.codec import AdapterCodec
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..data.augmentation import augmented_views
from ..data.encoded import EncodedExamples
from ..data.sources import Source, domains_of, inputs_of, load_table, training_table
from ..data.tasks import EpisodeSampler, LabelledRows, check_disjoint
from ..utils.files import write_file
from ..utils.run_folder import hold_folder
from .arguments import TrajectoryArguments
from .budget import blank_stack, bytes_per_task, stack_size_for
from .collect import TrajectorySettings, collect_trajectories
from .description import differences, package_versions
from .folder import TrajectoryFolder
from .shared import train_shared_adapter


class TrajectoryCollector:
    """Trains a shared start, optimises an adapter for each of many tasks of the `sources`, and writes the trajectory
    data set.

    A run that was interrupted continues where it stopped, on any number of processes of one launch: each stack of
    tasks is a file of its own.
    """

    def __init__(self, args: TrajectoryArguments, sources: list[Source]) -> None:
        # No Accelerator, which would settle the precision of all that comes after it in this process.
        self.args, self.state = args, PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
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
            held_rows = LabelledRows(held_out, "label", "group", domain_column="domain")
            check_disjoint(training=self.rows, held_out=held_rows)
        query = LabelledRows(self.table, "label", "group", spans[args.query_split]) if args.query_split else None
        shots, queries = tuple(args.examples_per_class), args.queries_per_class
        self.sampler = EpisodeSampler(self.rows, tuple(args.ways), shots, queries, args.seed + 1, query)
        self.stacked, self.codec = _adapted_backbone(args, self.state.device)
        shared = {"steps": args.shared_steps, "shots": args.shared_shots, "learning_rate": args.shared_learning_rate}
        self.description = {
            **where,
            "tasks": {key: getattr(args, key) for key in ("ways", "examples_per_class", "queries_per_class", "seed")},
            "num_views": args.num_views,
            "shared_start": shared,
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
            examples = self._encode()
            start, imprint_scale = self._shared_start(examples)
            settings = args.settings(imprint_scale)
            stack_size, _ = self._stack_size(examples, settings)
            description = {**self.description, "settings": asdict(settings), "stack_size": stack_size}
            with state.main_process_first():
                place, layout = args.output_dir / "trajectories", self.codec.layout
                folder = TrajectoryFolder.create(place, layout, args.ways[1], description)
            state.wait_for_everyone()
            # The same stacks whatever was interrupted, and on however many processes.
            missing = sorted(set(range(args.num_tasks)) - folder.numbers)
            stacks = [list(stack) for _, stack in groupby(missing, lambda number: number // stack_size)]
            state.wait_for_everyone()  # every process has read what is there before one of them writes
            features = None
            if not self.stacked.backbone.is_causal_lm:  # verbalizers need none
                features = self.stacked.features_of_all(start, examples)
            own = stacks[state.process_index :: state.num_processes]
            bar = self._bar("trajectories", sum(map(len, own)), "task")
            for numbers in own:
                tasks = [self.sampler[number] for number in numbers]
                folder.append(collect_trajectories(self.stacked, examples, start, features, tasks, numbers, settings))
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
        args, settings = self.args, self.args.settings(imprint_scale=10.0)
        self._check_space()
        examples = self._encode()
        stack_size, per_task = self._stack_size(examples, settings)
        tasks = [self.sampler[number] for number in range(min(stack_size, args.num_tasks))]
        stack = blank_stack(self.stacked, examples, tasks)
        trained = [value.requires_grad_() for value in stack.tensors.values()]
        for attempt in range(3):  # the last one counts
            batch = stack.draw(settings.batch_size, [np.random.default_rng(attempt)] * len(tasks))
            began = time.perf_counter()
            stack.gradients(trained, *batch)
            training = (time.perf_counter() - began) * settings.num_steps * (2 if settings.sam_rho else 1)
        began = time.perf_counter()
        stack.query_accuracies()
        minutes = (training + time.perf_counter() - began) / len(tasks) * args.num_tasks / 60
        layout, groups = self.codec.layout, self.rows.groups
        length = int(examples.lengths(torch.arange(len(examples))).max())
        memory = f"{per_task * stack_size / 2**20:.0f} MiB of the budget of {args.memory_budget * 1024:.0f} MiB"
        held = examples.hidden_states.nbytes // 2**20
        return {
            "tasks": f"{args.num_tasks}, of {sum(map(len, groups.values()))} classes in {len(groups)} groups",
            "examples": f"{len(examples)} in {args.num_views} views, of at most {length} tokens, {held} MiB",
            "weights": f"{layout.numel} LoRA weights in {len(layout.tokens)} tokens; a class has one token more",
            "stacks": f"{stack_size} tasks each, {memory}",
            "data set": f"{self._data_bytes() / 1e6:.0f} MB",
            "estimated time": f"{minutes:.1f} min on one process, without the shared start",
        }

    def _other_domains(self, sources: list[Source]) -> list[str]:
        known, held_out = domains_of(sources), self.args.held_out_domains
        if unknown := sorted(set(held_out) - set(known)):
            raise ValueError(f"There are no domains {unknown} to hold out: expected some of {known}.")
        return [domain for domain in known if domain not in held_out]

    def _bar(self, description: str, total: int, unit: str) -> tqdm:
        return tqdm(total=total, desc=description, unit=unit, disable=not self.state.is_main_process, smoothing=0)

    def _encode(self) -> EncodedExamples:
        """Run every example through the frozen lower layers, once for each view."""
        args = self.args
        views = augmented_views(inputs_of(self.table), args.num_views, args.seed)
        with self._bar("lower layers", len(views), "example") as bar:
            return self.stacked.encode(views, num_views=args.num_views, on_batch=bar.update, cache_dir=args.cache_dir)

    def _stack_size(self, examples: EncodedExamples, settings: TrajectorySettings) -> tuple[int, int]:
        """The number of tasks in a stack, and the bytes that each of them takes."""
        tasks = [self.sampler[number] for number in range(min(self.args.num_tasks, 100))]
        largest = max(tasks, key=lambda task: len(task.classes))
        per_task = bytes_per_task(self.stacked, examples, largest, settings)
        return min(self.args.max_stack_size, stack_size_for(int(self.args.memory_budget * 2**30), per_task)), per_task

    def _shared_start(self, examples: EncodedExamples) -> tuple[dict[str, torch.Tensor], float]:
        """Train the shared start on the main process, or read the one that an earlier run left."""
        path = self.args.output_dir / "shared_adapter.safetensors"
        made = json.dumps(self.description)
        with self.state.main_process_first():
            if not path.exists():
                content = save(self._train_shared_start(examples), {"made": made})
                write_file(path, lambda file: file.write(content))
            with safe_open(path, "pt", device=str(self.stacked.device)) as file:
                there = json.loads(file.metadata()["made"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        if different := differences(there, json.loads(made)):
            raise ValueError(f"{path} was made otherwise: {'; '.join(different)}. Choose another output_dir.")
        return tensors, tensors.pop("imprint_scale").item()

    def _train_shared_start(self, examples: EncodedExamples) -> dict[str, torch.Tensor]:
        args, steps = self.args, self.args.shared_steps
        sampler = EpisodeSampler(self.rows, tuple(args.ways), tuple(args.shared_shots), 5, args.seed)
        with self._bar("shared start", steps, "step") as bar:
            settings = {"seed": args.seed, "on_step": lambda *_: bar.update()}
            made = train_shared_adapter(self.stacked, examples, sampler, steps, args.shared_learning_rate, **settings)
        return {key: value.cpu() for key, value in made[0].items()} | {"imprint_scale": torch.tensor(made[1])}

    def _data_bytes(self) -> int:
        """The size of the whole data set on disk."""
        args = self.args
        return 4 * self.codec.layout.width(args.ways[1]) * (args.num_targets + 1) * args.num_tasks

    def _check_space(self) -> None:
        """Refuse a disk that is too small for the data set before anything is computed."""
        folder = self.args.output_dir.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        there = sum(path.stat().st_size for path in (folder / "trajectories" / "data").glob("*.parquet"))
        free, needed = shutil.disk_usage(existing).free, self._data_bytes() - there
        if free < needed:
            left = f"{existing} has {free / 1e6:.0f} MB left"
            raise OSError(f"{left}; the trajectories need {needed / 1e6:.0f} MB more. Choose another output_dir.")


def _adapted_backbone(args: TrajectoryArguments, device: torch.device) -> tuple[StackedLora, AdapterCodec]:
    place = args.pretrained_model_name_or_path
    name = args.base_model_name or place
    backbone = FrozenBackbone.from_pretrained(place, args.pooling, name, args.max_length, dtype=torch.float32)
    backbone.model.to(device)
    task_type = "CAUSAL_LM" if backbone.is_causal_lm else "SEQ_CLS"
    lora_config = LoraConfig(
        task_type=None if backbone.reads_images else task_type,  # PEFT has none for images
        r=args.rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.target_modules,
        layers_to_transform=args.layers,
        modules_to_save=[backbone.head_name] if backbone.reads_images else None,
    )
    codec = AdapterCodec.from_backbone(backbone, lora_config, token_dim=args.token_dim)
    return StackedLora(backbone, codec.layout), codec
