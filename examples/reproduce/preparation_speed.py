"""How fast weight preparation and the task loss are, and what takes the time: passes of some sizes, in float32 and bfloat16.

    python examples/reproduce/preparation_speed.py --mixture_root DATA --backbone BACKBONE --output_file speed.json

The tasks are those of the text release's own mixture, the adapters its own. Everything is timed in turn in one run, on one
thread, so that whatever else the machine does meets all of it. A size of no limit is one pass for all tasks.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from mcdi_hf import MCDiPipeline, TrajectoryArguments, TrajectoryCollector
from mcdi_hf.adapters import stacked as passes
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.data.sources import inputs_of, read_mixture
from mcdi_hf.data.tasks import Task
from mcdi_hf.training.objective import ConditionalDenoiser
from mcdi_hf.training.task_loss import TaskLoss
from mcdi_hf.trajectories.collect import TaskStack, TrajectorySettings
from mcdi_hf.trajectories.shared import SharedStart, source_of
from mcdi_hf.utils.files import write_file


ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "reproduce" / "configs" / "text_trajectories.json"
RELEASE = ROOT / "model_cards" / "mcdi-minilm-text"
NO_LIMIT = 10**9
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")


def collector_of(args: argparse.Namespace) -> TrajectoryCollector:
    """The release's own collection, which is asked for tasks alone."""
    settings = json.loads(CONFIG.read_text()) | {"exclude_texts_of": []}
    mixture = read_mixture(ROOT / settings.pop("mixture"), args.mixture_root)
    return TrajectoryCollector(
        TrajectoryArguments(
            output_dir=args.output_file.parent, pretrained_model_name_or_path=args.backbone, **settings
        ),
        mixture,
    )


def compact(stacks: list[list[Task]]) -> tuple[list[list[Task]], list[int]]:
    """Stacks whose rows are numbered anew, and the rows that they had."""
    parts = [(task.support, task.query) for stack in stacks for task in stack]
    rows = sorted({row for pair in parts for part in pair for own in part for row in own})
    place = {row: number for number, row in enumerate(rows)}

    def renumbered(part: tuple) -> tuple:
        return tuple(tuple(place[row] for row in own) for own in part)

    found = [
        [replace(one, support=renumbered(one.support), query=renumbered(one.query)) for one in own] for own in stacks
    ]
    return found, rows


class Replay:
    """Gives a shared start the same stacks again."""

    def __init__(self, stacks: list[list[Task]]) -> None:
        self.stacks = stacks

    def stack(self, number: int, count: int) -> list[Task]:
        return self.stacks[number % len(self.stacks)][:count]


class Work:
    """A step of the shared start, one of a stack of trajectories, one of the task loss: each a call with its number.

    `fresh` are stacks of tasks as the shared start and the task loss draw them, `drawn` those of trajectories with their
    ways; all point into `examples`.
    """

    def __init__(
        self,
        pipe: MCDiPipeline,
        examples: EncodedExamples,
        fresh: list[list[Task]],
        drawn: list[tuple[int, list[Task]]],
        settings: TrajectorySettings,
    ) -> None:
        self.pipe, self.fresh, self.bf16 = pipe, fresh, settings.mixed_precision == "bf16"
        sources = list(dict.fromkeys(source_of(task.group) for stack in fresh for task in stack))
        precision = settings.mixed_precision
        self.start = SharedStart(pipe.stacked, examples, Replay(fresh), sources, mixed_precision=precision)
        self.stacks = [TaskStack(pipe.stacked, pipe.codec, examples, tasks, ways, settings) for ways, tasks in drawn]
        self.model = ConditionalDenoiser(pipe.task_encoder, pipe.denoiser).train()
        self.loss = TaskLoss(pipe.stacked, pipe.codec, pipe.scheduler, examples)
        pipe.scheduler.set_timesteps(pipe.config.num_inference_steps)

    def shared_start(self, number: int) -> None:
        self.start.train_step()

    def trajectories(self, number: int) -> None:
        stack = self.stacks[number]
        stack.gradient(*stack.draw(1, [np.random.default_rng(one) for one in range(len(stack.tasks))]))

    def task_loss(self, number: int) -> None:
        tasks = self.fresh[number]
        generators = [torch.Generator().manual_seed(one) for one in range(len(tasks))]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.loss(self.model, tasks, number % len(self.pipe.scheduler.timesteps), generators).mean().backward()


def seconds(work: dict[str, Work], kind: str, sizes: list[int], number: int) -> dict[str, float]:
    """Seconds a step for every precision and size of a pass."""
    found = dict.fromkeys([f"{precision}, {size}" for precision in work for size in sizes], 0.0)
    for step in range(-1, number):  # the first is not counted
        for precision, own in work.items():
            for size in sizes:
                passes.ROWS_AT_ONCE = size
                began = time.perf_counter()
                getattr(own, kind)(max(step, 0))
                found[f"{precision}, {size}"] += (time.perf_counter() - began) * (step >= 0) / number
    return found


def profiled(own: Work, kind: str, number: int) -> dict[str, float]:
    """The share of the time of matrix products, and of the eight operations that take most besides."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(number):
            getattr(own, kind)(step)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {"matrix products": sum(times.get(name, 0) for name in PRODUCTS) / total}
    rest = sorted((name for name in times if name not in PRODUCTS), key=times.get, reverse=True)
    return shares | {name: times[name] / total for name in rest[:8]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture_root", type=Path, required=True, help="a folder with the mixture's data sets")
    parser.add_argument("--backbone", required=True, help="all-MiniLM-L6-v2: a folder or a Hub id")
    parser.add_argument("--stacks", type=int, default=8, help="of 8 tasks each (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="rows of a pass")
    parser.add_argument("--output_file", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    collector = collector_of(args)
    pipe = MCDiPipeline.from_pretrained(RELEASE)
    pipe.register_to_config(base_model_name_or_path=args.backbone)
    fresh = [collector.sampler.stack(stack, 8) for stack in range(args.stacks)]
    ways, drawn = zip(*(collector._tasks(stack) for stack in range(args.stacks)))
    stacks, rows = compact([*fresh, *drawn])
    inputs = inputs_of(collector.table)
    examples = pipe.stacked.encode([inputs[row] for row in rows])
    fresh, drawn = stacks[: args.stacks], list(zip(ways, stacks[args.stacks :]))
    settings = collector.args.settings()
    work = {
        precision: Work(pipe, examples, fresh, drawn, replace(settings, mixed_precision=precision))
        for precision in ("no", "bf16")
    }
    found = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "stacks": args.stacks}
    ours = passes.ROWS_AT_ONCE
    for kind in ("shared_start", "trajectories", "task_loss"):
        took = seconds(work, kind, [NO_LIMIT, *args.sizes], args.stacks)
        base = took[f"no, {NO_LIMIT}"]
        for name, one in took.items():
            print(f"{kind:<14} {name:<18} {one:.2f} s a step, {base / one:.2f} times the steps of one pass in float32")
        found[kind] = {"seconds": took}
        for name, size in (("one pass", NO_LIMIT), ("now", ours)):
            passes.ROWS_AT_ONCE = size
            found[kind][f"profile, {name}"] = profiled(work["bf16"], kind, min(4, args.stacks))
    write_file(args.output_file, lambda file: file.write(json.dumps(found, indent=1).encode()))


if __name__ == "__main__":
    main()
