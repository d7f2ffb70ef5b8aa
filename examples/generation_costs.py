"""What a call of the pipeline costs: the least that its matrix products take, where the time goes, how much memory."""

import multiprocessing
import statistics
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from generation_tasks import TaskSet, Workload
from torch.utils._python_dispatch import TorchDispatchMode

from mcdi_hf import MCDiPipeline


aten = torch.ops.aten
# Where the two factors of a product stand among an operator's arguments.
FACTORS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
ATTENTION = (aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention)


class Products(TorchDispatchMode):
    """The matrix products that the denoiser takes in a call of the pipeline, to be run again without anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._matrices: dict[tuple[int, ...], torch.Tensor] = {}

    @classmethod
    def of_call(cls, pipe: MCDiPipeline, supports: list[dict], steps: int) -> "Products":
        """Watch the denoiser in one call."""
        found = cls()

        def start(*_: Any) -> None:
            found.__enter__()

        def stop(*_: Any) -> None:
            found.__exit__(None, None, None)

        hooks = pipe.denoiser.register_forward_pre_hook(start), pipe.denoiser.register_forward_hook(stop)
        pipe(supports, num_inference_steps=steps)
        for hook in hooks:
            hook.remove()
        return found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if function.overloadpacket in FACTORS:
            place = FACTORS[function.overloadpacket]
            self.shapes.append((tuple(args[place].shape), tuple(args[place + 1].shape)))
        elif function.overloadpacket in ATTENTION:  # one operator, two products
            rows, heads, length, width = args[0].shape
            queries, scores = (rows * heads, length, width), (rows * heads, length, length)
            self.shapes += [(queries, (rows * heads, width, length)), (scores, queries)]
        return function(*args, **(kwargs or {}))

    def run(self) -> None:
        """The products, one after the other, each shape on the same numbers."""
        for left, right in self.shapes:
            torch.matmul(self._matrix(left), self._matrix(right))

    def _matrix(self, shape: tuple[int, ...]) -> torch.Tensor:
        if shape not in self._matrices:
            self._matrices[shape] = torch.randn(shape)
        return self._matrices[shape]


def floors(pipe: MCDiPipeline, task_set: TaskSet, steps: int, batches: tuple[int, ...], repeats: int) -> list[dict]:
    """For each batch the seconds of a call, of the features alone, and of the denoiser's bare products, in turn."""
    found = []
    for batch in batches:
        products = Products.of_call(pipe, task_set.batch(0, batch), steps)
        row = {
            "batch": batch,
            "steps": steps,
            "products": len(products.shapes),
            "call": [],
            "features": [],
            "floor": [],
        }
        products.run()
        for repeat in range(repeats):
            supports = task_set.batch(repeat * batch, batch)
            # one support set with all examples: `embed` takes one
            merged = {f"{number} {label}": own[label] for number, own in enumerate(supports) for label in own}
            calls = {
                "call": lambda: pipe(supports, num_inference_steps=steps),
                "features": lambda: pipe.embed(merged),
                "floor": products.run,
            }
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                row[name].append(time.perf_counter() - start)
        found.append(row)
    return found


def floor_ratio(row: dict) -> float:
    """A call over its features and its floor, medians."""
    call, features, floor = (statistics.median(row[name]) for name in ("call", "features", "floor"))
    return call / (features + floor)


def parts(pipe: MCDiPipeline, task_set: TaskSet, steps: int, repeats: int) -> dict[str, float]:
    """Where the time of a call for one task goes: the median seconds of each part, and of the whole."""
    watched = {
        "tokens": (pipe.backbone, "tokens"),
        "encode": (pipe.stacked, "encode"),
        "features": (pipe.stacked, "features_of_all"),
        "condition": (pipe.task_encoder, "forward"),
        "denoiser": (pipe.denoiser, "forward"),
        "sample": (pipe, "sample"),
        "complete": (pipe, "complete"),
    }
    runs = []
    for repeat in range(repeats):
        spent = defaultdict(float)
        with ExitStack() as watches:
            for name, (owner, method) in watched.items():
                timed = _timed(getattr(owner, method), spent, name)
                watches.enter_context(patch.object(owner, method, timed))
            _timed(pipe, spent, "call")([task_set.support(repeat)], num_inference_steps=steps)
        runs.append(spent)
    median = {name: statistics.median(run[name] for run in runs) for name in [*watched, "call"]}
    found = {
        "tokens or pixels": median["tokens"],
        "lower layers": median["encode"] - median["tokens"],
        "adapted layers (features)": median["features"],
        "condition encoder": median["condition"],
        "denoiser": median["denoiser"],
        "noise and scheduler": median["sample"] - median["condition"] - median["denoiser"],
        "decoding, imprinted head": median["complete"],
    }
    rest = median["call"] - median["encode"] - median["features"] - median["sample"] - median["complete"]
    return found | {"all else: checks, views, padding, objects": rest, "call": median["call"]}


def _timed(function, spent: dict[str, float], name: str):
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return timed


def peak_memory(values: dict, data_root: Path, kind: str, batches: tuple[int, ...], steps: int) -> dict[str, float]:
    """MiB that calls of growing batches need beyond the loaded pipeline and its data, in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads that do not run in it
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peaks, values, data_root, kind, batches, steps).result()


def _peaks(values: dict, data_root: Path, kind: str, batches: tuple[int, ...], steps: int) -> dict[str, float]:
    workload = Workload(values, data_root)
    task_set = workload.task_set(kind, seed=1000, count=max(batches))
    memory = psutil.Process().memory_info
    loaded, found = memory().rss, {}
    for batch in sorted(batches):
        ended, peak = threading.Event(), [0]

        def watch() -> None:
            while not ended.wait(0.001):
                peak[0] = max(peak[0], memory().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        workload.pipe(task_set.batch(0, batch), num_inference_steps=steps)
        ended.set()
        watcher.join()
        found[str(batch)] = (max(peak[0], memory().rss) - loaded) / 2**20
    return found
