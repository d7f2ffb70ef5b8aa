"""`mcdi-hf generate`: labelled examples in, adapters out, one a task."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm

from ..adapters.generated import CONFIG, GeneratedAdapter
from ..pipelines.support import as_support_sets
from ..utils.files import read_json, write_file
from ..utils.run_folder import hold_folder
from .pipeline import load_pipeline
from .tables import column, labelled, read_table


RECORD = "made_with.json"
STACK = 64  # tasks that are made together, whatever the number of processes, so that rounding is the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("file", help="CSV, TSV, JSON Lines, Parquet, a folder of images by class, a folder or a Hub id of a data set")
    add("--pipeline", required=True, help="a generator: a folder or a Hub id")
    add("--base_model_name_or_path", help="a local copy of its backbone")
    add("--output_dir", type=Path, required=True, help="the adapter's folder, or one of a folder for each task")
    add("--input_column", help="the column of texts or images, if its name does not tell")
    add("--label_column", help="the column of labels, if its name does not tell")
    add("--task_column", help="make one adapter for each value of this column")
    add("--split", default="train", help="of a data set (default: %(default)s)")
    add("--num_candidates", type=int, default=4, help="drawn for each task (default: %(default)s)")
    add("--select", action="store_true", help="keep what is free where that judges the examples better")
    add("--seed", type=int, default=0, help="of all noise (default: %(default)s)")
    add("--push_to_hub", metavar="ID", help="push to user/name, or to user/name-TASK for each task")


def run(args: argparse.Namespace) -> None:
    """Make the adapters that are not there yet, this process its share of the stacks."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    tasks = read_tasks(args)
    repos = repositories(args.push_to_hub, list(tasks)) if args.push_to_hub else {}
    with hold_folder(args.output_dir, state):
        if state.is_main_process:
            _check_record(args)
        state.wait_for_everyone()
        places = {task: args.output_dir / folder_of(task) if args.task_column else args.output_dir for task in tasks}
        stacks = [list(tasks)[first : first + STACK] for first in range(0, len(tasks), STACK)]
        # A stack is made whole or found whole, so a run that was killed ends in the same files.
        missing = [stack for stack in stacks if not all((places[task] / CONFIG).is_file() for task in stack)]
        state.wait_for_everyone()  # every process has seen what is there before one of them writes
        own = missing[state.process_index :: state.num_processes]
        adapters = _adapters(args, tasks, own, state)
        bar = tqdm(total=sum(map(len, own)), unit="adapter", disable=not state.is_main_process, smoothing=0)
        for task, adapter in adapters:
            if args.push_to_hub:
                adapter.push_to_hub(repos[task])
            adapter.save_pretrained(places[task])  # last, since what lies there counts as done
            bar.update()
        bar.close()
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(tasks)} adapters are in {args.output_dir}; {sum(map(len, missing))} were made now.")
    state.destroy_process_group()


def read_tasks(args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """The support set of every task, by its name; one without a name if there is no column of tasks."""
    table = read_table(args.file, args.split)
    examples, labels = labelled(table, args.input_column, args.label_column)
    names = [""] * len(examples)
    if args.task_column:
        names = [str(name or "") for name in column(table, args.task_column)]
    if args.task_column and (empty := [row for row, name in enumerate(names, 1) if not name.strip()]):
        raise ValueError(f"{len(empty)} rows have no {args.task_column}, such as the rows {empty[:5]}.")
    tasks: dict[str, dict[str, list]] = {}
    for name, example, label in zip(names, examples, labels):
        tasks.setdefault(name, {}).setdefault(label, []).append(example)
    if small := [name for name, support in tasks.items() if len(support) < 2]:
        where = f"The tasks {small[:5]} have" if args.task_column else f"{args.file} has"
        raise ValueError(
            f"{where} one class: expected two at least. Is {args.label_column or 'the label'} the right column?"
        )
    if not tasks:
        raise ValueError(f"{args.file} has no rows: expected examples of two classes at least.")
    for name, support in tasks.items():
        try:
            as_support_sets(support)
        except ValueError as error:
            raise ValueError(f"Task {name!r}: {error}" if args.task_column else str(error)) from error
    return tasks


def _adapters(
    args: argparse.Namespace, tasks: dict[str, dict[str, list]], stacks: list[list[str]], state: PartialState
) -> Iterator[tuple[str, GeneratedAdapter]]:
    """The adapters of some stacks of tasks. A task's noise depends on its name and the seed, and on nothing else."""
    if not stacks:
        return
    pipe = load_pipeline(args.pipeline, args.base_model_name_or_path).to(state.device)
    for stack in stacks:
        generators = [torch.Generator().manual_seed(seed_of_task(args.seed, task)) for task in stack]
        output = pipe([tasks[task] for task in stack], num_candidates=args.num_candidates, generator=generators)
        output = pipe.select(output) if args.select else output
        yield from zip(stack, output.adapters)


def folder_of(task: str) -> str:
    """A folder's name for a task, another one for every task, that leads nowhere else."""
    name = quote(task, safe=" ")
    return name.replace(".", "%2E", 1) if name.startswith(".") else name


def repositories(repo_id: str, tasks: list[str]) -> dict[str, str]:
    """A repository of the Hub for every task, whose names the Hub takes; tasks that would share one are refused."""
    if tasks == [""]:
        return {"": repo_id}
    repos = {task: f"{repo_id}-{re.sub('[^a-zA-Z0-9]+', '-', task).strip('-')}" for task in tasks}
    for place in repos.values():
        if len(alike := [task for task, own in repos.items() if own == place]) > 1 or place.endswith("-"):
            raise ValueError(f"The tasks {alike[:5]} have no repository of their own, {place}: rename them.")
        validate_repo_id(place)
    return repos


def seed_of_task(seed: int, task: str) -> int:
    """The seed of a task's noise, the same in any file and on any process."""
    digest = hashlib.sha256(json.dumps([seed, task]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _check_record(args: argparse.Namespace) -> None:
    """Refuse a folder whose adapters were made of other examples or otherwise, and say how this one's are."""
    made = {name: value for name, value in vars(args).items() if isinstance(value, str | int | None)}
    for name in ("command", "push_to_hub", "base_model_name_or_path"):
        made.pop(name, None)
    if Path(args.file).is_file():
        made["file"] = hashlib.sha256(Path(args.file).read_bytes()).hexdigest()
    place = args.output_dir / RECORD
    begun = any(path for pattern in (CONFIG, f"*/{CONFIG}") for path in args.output_dir.glob(pattern))
    if begun and place.is_file() and (found := read_json(place)) != made:
        different = [
            f"{name}: {found.get(name)!r} there, {made[name]!r} now" for name in made if found.get(name) != made[name]
        ]
        raise ValueError(f"{args.output_dir} was made otherwise ({'; '.join(different)}): choose another output_dir.")
    text = json.dumps(made, indent=1)
    write_file(place, lambda file: file.write(text.encode()))
