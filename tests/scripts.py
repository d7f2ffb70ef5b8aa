"""Running the example scripts as a person does, on a tiny backbone and data set in folders."""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from tiny import tiny_backbone

from mcdi_hf import FrozenBackbone, MCDiTrainingArguments, Source, TrajectoryArguments, TrajectoryCollector


EXAMPLES = Path(__file__).parents[1] / "examples"
DOMAINS, CLASSES = ["north", "south", "west"], 4
# Two processes on CPUs: with --cpu instead of --multi_gpu Accelerate would start one, silently.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no".split()


def start(*command: str | Path, **environment: str) -> subprocess.Popen:
    """Start Python with arguments, on one thread, offline unless the environment says otherwise."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables | environment,
    )


def call(*command: str | Path, **environment: str) -> str:
    """Run Python with arguments to its end; what it printed."""
    process = start(*command, **environment)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed


# A function for processes that are to be killed, as they have it in front of what they run.
KILL_AT = """
import os, signal, sys


def kill_at(folder, number):
    # SIGKILL right before the process changes something below a folder for the so many-th time
    count = 0

    def watch(event, values):
        nonlocal count
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += os.path.abspath(str(values[0])).startswith(folder)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
"""

# The imports take most of a start, so they are done once; then each script is the main module of a process of its own.
RUN_EACH = """
import json, resource, runpy
import accelerate, datasets, mcdi_hf.commands.main
for limit, kill, script, *arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if kill is not None:
            kill_at(*kill)
        sys.path[0], sys.argv = os.path.dirname(script), [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    os.write(1, b"%d\\0" % code)
    os.write(2, b"\\0")
"""


def run_each(
    commands: dict[str, list[str | Path]],
    file_sizes: dict[str, int] | None = None,
    kills: dict[str, tuple[Path, int]] | None = None,
    **environment: str,
) -> dict[str, tuple[int, str, str]]:
    """Run scripts with arguments one after another; name -> return code, what it printed, what it said on stderr.

    A limit in `file_sizes` makes a longer file the same error as a full disk. A folder and a number in `kills` kill the
    process (code -9) right before it writes, makes, moves or deletes something in the folder for the so many-th time.
    """
    limits, kills = file_sizes or {}, {name: (str(folder), count) for name, (folder, count) in (kills or {}).items()}
    rows = [[limits.get(name), kills.get(name), *map(str, command)] for name, command in commands.items()]
    process = start("-c", KILL_AT + RUN_EACH, json.dumps(rows), **environment)
    printed, errors = process.communicate(timeout=300 + 60 * len(rows))
    assert process.returncode == 0, errors
    found = {}
    for name, out, said in zip(commands, printed.split("\0"), errors.split("\0")):
        lines = out.splitlines()
        found[name] = (int(lines[-1]), "\n".join(lines[:-1]), said)
    return found


def save_backbone(backbone: FrozenBackbone, folder: Path) -> Path:
    """Write a backbone and its tokenizer or image processor; mean-pooled ones as the encoder that they are made of."""
    model = backbone.model.base_model if backbone.pooling == "mean" else backbone.model
    model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


def write_split(folder: Path, split: str, dataset: Dataset) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def write_source(folder: Path, words: list[str]) -> Path:
    """Every class has two words of its own among others that say nothing."""
    random = np.random.default_rng(0)
    names = [f"{domain}_{number}" for domain in DOMAINS for number in range(CLASSES)]
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=names), "domain": ClassLabel(names=DOMAINS)}
    )
    for split, count in {"train": 8, "validation": 3, "test": 3}.items():
        rows = []
        for label in np.repeat(np.arange(len(names)), count).tolist():
            own = [words[2 * label % len(words)], words[(2 * label + 1) % len(words)]]
            text = " ".join(own + random.choice(words, size=random.integers(1, 5)).tolist())
            rows.append({"text": text, "label": label, "domain": label // CLASSES})
        write_split(folder, split, Dataset.from_list(rows, features=features))
    return folder


def write_letters(folder: Path, backbone: FrozenBackbone) -> Path:
    """[`write_source`] in the words of a tiny backbone."""
    return write_source(folder, sorted(word for word in backbone.processor.get_vocab() if word.isalpha()))


@dataclass
class Collected:
    """What tests of all that comes after weight preparation start from; they only read it.

    Attributes:
        root (`Path`): The folder of all: `backbone`, `source`, and `collected` with its `trajectories`.
    """

    root: Path

    @property
    def backbone(self) -> Path:
        return self.root / "backbone"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def trajectories(self) -> Path:
        """The folder that the collector wrote, in which the data set is `trajectories`."""
        return self.root / "collected"

    @classmethod
    def make(cls, root: Path) -> "Collected":
        """Four trajectories of the first two domains."""
        made, backbone = cls(root), tiny_backbone()
        save_backbone(backbone, made.backbone)
        write_letters(made.source, backbone)
        arguments = collecting(made.backbone, made.trajectories)
        TrajectoryCollector(arguments, [Source(str(made.source), group_column="domain")]).collect()
        return made


def collecting(backbone: Path, output_dir: Path, **changes) -> TrajectoryArguments:
    """Four tasks of the first two domains of [`write_source`], in two stacks."""
    values = {
        "pretrained_model_name_or_path": str(backbone),
        "train_domains": DOMAINS[:2],
        "pooling": "mean",
        "ways": [2, 3],
        "shots": [1, 3],
        "queries_per_class": 2,
        "rank": 2,
        "target_modules": ["query", "value"],
        "layers": [1],
        "shared_steps": 3,
        "tasks_per_step": 2,
        "num_tasks": 4,
        "stack_size": 2,
        "max_train_steps": 6,
    }
    return TrajectoryArguments(output_dir=output_dir, **(values | changes))


def training(output_dir: Path, **changes) -> MCDiTrainingArguments:
    """Six steps on what [`Collected`] has, with every kind of loss, validated on the third domain."""
    values = {
        "validation_domains": DOMAINS[2:],
        "validation_tasks": ["2x1", "3x2"],
        "num_validation_episodes": 2,
        "dim": 16,
        "num_layers": 1,
        "shots": [1, 3],
        "train_batch_size": 2,
        "tasks_per_step": 3,
        "inner_steps": 2,
        "max_train_steps": 6,
        "lr_warmup_steps": 2,
        "validation_steps": 3,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 9,
        "validation_queries": 3,
        "num_conditions": 3,
        "task_loss_weight": 0.5,
        "task_loss_tasks": 3,
        "task_loss_warmup_steps": 4,
        "queries_per_class": 2,
        "segment_weights": [1, 1, 2],
        "max_grad_norm": 1,
    }
    return MCDiTrainingArguments(output_dir=output_dir, **(values | changes))


def command_line(arguments: Any, *without: str) -> list[str]:
    """The options that say what a dataclass says, where that is not the default."""
    options = []
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and field.name not in without:
            options += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return options
