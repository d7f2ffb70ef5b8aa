"""`mcdi-hf evaluate`: accuracy by shots of a generator on a data set of yours, beside what is free and gradient LoRA.

Every method sees the same episodes: support sets drawn from the data set, and other rows to be judged on. The penalty of
the regression and the learning rate of gradient LoRA are chosen on episodes of their own.
"""

import argparse

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm

from ..data.tasks import EpisodeSampler, LabelledRows
from .pipeline import load_pipeline
from .rivals import Rivals
from .tables import labelled, read_table


TUNING_EPISODES = 8
SHOTS = [1, 4, 16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("--pipeline", required=True, help="a generator: a folder or a Hub id")
    add("--dataset_name", required=True, help="a labelled data set: a file as for `generate`, a folder or a Hub id")
    add("--base_model_name_or_path", help="a local copy of the backbone")
    add("--input_column", help="the column of texts or images, if its name does not tell")
    add("--label_column", help="the column of labels, if its name does not tell")
    add("--split", default="train", help="whose rows support and query are drawn from (default: %(default)s)")
    add(
        "--shots",
        type=int,
        nargs="+",
        help="examples of a class (default: those of 1, 4 and 16 that the data set has)",
    )
    add("--ways", type=int, help="classes of an episode (default: all, 5 at most)")
    add("--queries", type=int, default=10, help="rows of a class to be judged on (default: %(default)s)")
    add("--num_episodes", type=int, default=40, help="for each number of shots (default: %(default)s)")
    add("--num_candidates", type=int, default=4, help="adapters drawn for each episode (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the episodes and the noise (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Draw the episodes, and print a table for each number of shots."""
    inputs, labels = labelled(read_table(args.dataset_name, args.split), args.input_column, args.label_column)
    names = sorted(set(labels))
    numbers = Dataset.from_dict({"label": [names.index(label) for label in labels]})
    rows = LabelledRows(numbers.cast_column("label", ClassLabel(names=names)), "label")
    ways = args.ways or min(5, len(names))
    least = min(map(len, rows.groups["all"].values()))
    wanted = args.shots or [shots for shots in SHOTS if shots < least] or SHOTS[:1]
    drawn = {shots: EpisodeSampler(rows, (ways, ways), (shots, shots), args.queries, args.seed) for shots in wanted}
    pipe = load_pipeline(args.pipeline, args.base_model_name_or_path)
    rivals = Rivals(pipe, inputs, args.num_candidates, args.seed)
    print(
        f"{len(inputs)} rows of {len(names)} classes; {args.num_episodes} episodes of {ways} classes for each number of shots"
    )
    for shots, sampler in drawn.items():
        # Those that settings are chosen on come behind those that count.
        tasks = [sampler[number] for number in range(args.num_episodes + TUNING_EPISODES)]
        methods, found = rivals.methods(tasks[args.num_episodes :]), {}
        torch.manual_seed(args.seed)  # of the noise that adapters are drawn from
        for name, method in tqdm(methods.items(), desc=f"{shots} shots", unit="method", leave=False):
            found[name] = np.array(method(tasks=tasks[: args.num_episodes]))
        _report(shots, found)


def _report(shots: int, found: dict[str, np.ndarray]) -> None:
    """Print a table of accuracies in percent and of paired differences, each with half its 95 % interval."""
    print(f"\n{shots} shots{'':<22} accuracy        generated minus it")
    for name, values in found.items():
        own, gain = _percent(values), "" if name == "generated" else _percent(found["generated"] - values, sign="+")
        print(f"  {name:<26} {own:<15} {gain}")


def _percent(values: np.ndarray, sign: str = "") -> str:
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * values.mean():{sign}.1f} ± {100 * half:.1f}"
