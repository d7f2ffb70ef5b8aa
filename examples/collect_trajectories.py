"""Weight preparation: train a shared start, optimise an adapter for each of many tasks, write the trajectory data set.

    python examples/collect_trajectories.py --dataset_name CLINC150 --label_column intent --group_column domain \
        --held_out_domains utility work small_talk meta oos --query_split validation --output_dir runs/intents

    accelerate launch examples/collect_trajectories.py --mixture examples/mixtures/binary.json --ways 2 2 ...

An interrupted run continues where it stopped, on any number of processes: each stack of tasks is a file of its own.
`--dry_run` says what a run would make and take, and trains nothing.
"""

import argparse
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from config import parse_args
from datasets.utils.logging import disable_progress_bar
from output_folder import hold_folder
from preparation import Collection, add_adapter_arguments, add_data_arguments, add_optimiser_arguments
from tqdm.auto import tqdm

from mcdi_hf import TrajectoryFolder, collect_trajectories
from mcdi_hf.trajectories.budget import blank_stack


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Those of the command line, or `given`, and of `--config`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser.add_argument_group("data and tasks"))
    add_adapter_arguments(parser.add_argument_group("backbone and adapters"))
    add_optimiser_arguments(parser.add_argument_group("optimiser"))
    run = parser.add_argument_group("run")
    run.add_argument("--memory_budget", type=float, default=0.5, help="GiB that a stack may take")
    run.add_argument("--max_stack_size", type=int, default=16, help="more tasks at once are no faster on a CPU")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--dry_run", action="store_true", help="say what it would make and take, and train nothing")
    run.add_argument("--output_dir", type=Path, required=True)
    run.add_argument("--push_to_hub", action="store_true")
    run.add_argument("--hub_dataset_id")
    args = parse_args(parser, given)
    if (args.mixture is None) == (args.dataset_name is None):
        parser.error("name either --dataset_name or --mixture")
    if args.push_to_hub and not args.hub_dataset_id:
        parser.error("--push_to_hub needs --hub_dataset_id")
    return args


def missing_stacks(numbers: set[int], num_tasks: int, stack_size: int) -> list[list[int]]:
    """The stacks that are still to be computed: the same ones whatever was interrupted, and in whatever order."""
    stacks: dict[int, list[int]] = {}
    for number in sorted(set(range(num_tasks)) - numbers):
        stacks.setdefault(number // stack_size, []).append(number)
    return list(stacks.values())


def check_space(collection: Collection) -> None:
    """Refuse a disk that is too small for the data set before anything is computed."""
    folder = collection.args.output_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    there = sum(path.stat().st_size for path in (folder / "trajectories" / "data").glob("*.parquet"))
    free, needed = shutil.disk_usage(existing).free, collection.data_bytes() - there
    if free < needed:
        raise OSError(f"{existing} has {free / 1e6:.0f} MB left; the trajectories need {needed / 1e6:.0f} MB more.")


def dry_run(collection: Collection) -> None:
    """Say what a run would make and take: passes of one stack are timed, and nothing is trained or written."""
    args, settings = collection.args, collection.settings(imprint_scale=10.0)
    stack_size, per_task = collection.stack_size(settings)
    tasks = [collection.sampler[number] for number in range(min(stack_size, args.num_tasks))]
    stack = blank_stack(collection.stacked, collection.examples, tasks)
    trained = [value.requires_grad_() for value in stack.tensors.values()]
    times = []
    for attempt in range(3):
        batch = stack.draw(settings.batch_size, [np.random.default_rng(attempt)] * len(tasks))
        began = time.perf_counter()
        stack.gradients(trained, *batch)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    stack.query_accuracies()
    judging = time.perf_counter() - began
    passes = settings.num_steps * (2 if settings.sam_rho else 1)
    minutes = (times[-1] * passes + judging) / len(tasks) * args.num_tasks / 60
    layout = collection.codec.layout
    length = collection.examples.lengths(torch.arange(len(collection.examples))).max()
    held = collection.examples.hidden_states.nbytes // 2**20
    classes = sum(len(own) for own in collection.rows.groups.values())
    memory = f"{per_task * stack_size / 2**20:.0f} MiB of the budget of {args.memory_budget * 1024:.0f} MiB"
    lines = {
        "tasks": f"{args.num_tasks}, of {classes} classes in {len(collection.rows.groups)} groups",
        "examples": f"{len(collection.examples)} in {args.num_views} views, of at most {length} tokens, {held} MiB",
        "weights": f"{layout.numel} LoRA weights in {len(layout.tokens)} tokens; a class has one token more",
        "stacks": f"{stack_size} tasks each, {memory}",
        "data set": f"{collection.data_bytes() / 1e6:.0f} MB",
        "estimated time": f"{minutes:.1f} min on one process, without the shared start",
    }
    for name, value in lines.items():
        print(f"{name:<16} {value}")


def run(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    main = accelerator.is_main_process
    disable_progress_bar()  # one bar for the run
    collection = Collection(args, accelerator.device)
    check_space(collection)
    collection.encode(show=main)
    if args.dry_run:
        dry_run(collection)
        return
    lock = hold_folder(args.output_dir, accelerator)
    start, imprint_scale = collection.shared_start(accelerator)
    settings = collection.settings(imprint_scale)
    stack_size, _ = collection.stack_size(settings)
    description = {**collection.description, "settings": asdict(settings), "stack_size": stack_size}
    with accelerator.main_process_first():
        folder = TrajectoryFolder.create(
            args.output_dir / "trajectories", collection.codec.layout, args.ways[1], description
        )
    accelerator.wait_for_everyone()
    stacks = missing_stacks(folder.numbers, args.num_tasks, stack_size)
    accelerator.wait_for_everyone()  # every process has read what is there before one of them writes
    features = collection.start_features(start)
    own = stacks[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=sum(map(len, own)), desc="trajectories", unit="task", disable=not main, smoothing=0)
    for numbers in own:
        tasks = [collection.sampler[number] for number in numbers]
        rows = collect_trajectories(collection.stacked, collection.examples, start, features, tasks, numbers, settings)
        folder.append(rows)
        bar.update(len(numbers))
    bar.close()
    accelerator.wait_for_everyone()
    if main:
        report(folder, folder.finish())
        if args.push_to_hub:
            folder.push_to_hub(args.hub_dataset_id)
    lock.release()
    accelerator.end_training()


def report(folder: TrajectoryFolder, summary: dict) -> None:
    print(f"{summary['tasks']} trajectories, {summary['megabytes']:.1f} MB, in {folder.folder}")
    print(f"{'group':<40} {'tasks':>6}")
    for group, count in summary["groups"].items():
        print(f"{group:<40} {count:>6}")
    for name, key in (("training accuracy", "train_accuracy"), ("held-out accuracy", "accuracy")):
        mean, deviation = summary[key]
        print(f"{name:<40} {mean:>6.3f} (sd {deviation:.3f})")
    for step, loss in summary["losses"].items():
        print(f"{f'loss at step {step}':<40} {loss:>6.3f}")


def main() -> None:
    args = arguments()
    try:
        run(args)
    except OSError as error:  # a disk that is full or a folder that cannot be written is no bug of ours
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
