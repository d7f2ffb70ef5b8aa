"""What serving generated adapters costs: a swap in a live PEFT model, and a batch in which each row has its own."""

import time
from typing import Any

import torch

from mcdi_hf import AdapterSlot, GeneratedAdapter, MCDiPipeline, MixedAdapters


def swap_seconds(pipe: MCDiPipeline, adapters: list[GeneratedAdapter], repeats: int) -> list[float]:
    """The seconds of every swap of one adapter after the other into a live PEFT model."""
    slot = AdapterSlot(adapters[0].load_into(pipe.backbone.classifier(len(adapters[0].labels))))
    found = []
    for repeat in range(repeats):
        adapter = adapters[(repeat + 1) % len(adapters)]
        start = time.perf_counter()
        slot.swap(adapter)
        found.append(time.perf_counter() - start)
    return found


def mixed_seconds(
    pipe: MCDiPipeline, adapters: list[GeneratedAdapter], examples: list[Any], repeats: int
) -> dict[str, list[float]]:
    """The seconds of a batch in which each row has an adapter of its own, and of the plain backbone, in turn.

    Both are timed from the examples on.
    """
    names = [f"adapter {number}" for number in range(len(adapters))]
    mixed = MixedAdapters(pipe.backbone, pipe.codec.layout)
    for name, adapter in zip(names, adapters):
        mixed.add(name, adapter)

    @torch.no_grad()
    def plain() -> None:
        pipe.backbone.model(**pipe.backbone.inputs(examples))

    calls = {"mixed": lambda: mixed(examples, names), "plain": plain}
    found = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first call of a shape is slower than all others
                found[name].append(time.perf_counter() - start)
    return found


def serving(pipe: MCDiPipeline, supports: list[dict], examples: list[Any], repeats: int) -> dict[str, Any]:
    """Both costs, with an adapter for each support set and an example for each adapter.

    Args:
        pipe (`MCDiPipeline`): Makes the adapters.
        supports (`list[dict]`): Support sets of as many classes each.
        examples (`list`): One for each support set, for its adapter to classify.
        repeats (`int`): Of a batch; swaps are so short that 100 times as many are timed.
    """
    adapters = pipe(supports).adapters
    return {
        "adapters": len(adapters),
        "swap": swap_seconds(pipe, adapters, 100 * repeats),
        **mixed_seconds(pipe, adapters, examples, repeats),
    }
