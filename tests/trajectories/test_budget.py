"""The memory that a stack is said to take is at least what PyTorch's allocator saw, and not many times that."""

import pytest
import torch
from model_families import FAMILIES, image_tasks, text_tasks
from torch.profiler import ProfilerActivity, profile

from mcdi_hf import AdapterLayout, StackedLora, TrajectorySettings, collect_trajectories
from mcdi_hf.trajectories.budget import bytes_per_task, stack_size_for
from mcdi_hf.trajectories.shared import initial_adapter


def test_the_stack_size_follows_from_the_budget() -> None:
    assert stack_size_for(100, 100) == 1 and stack_size_for(1000, 101) == 9
    with pytest.raises(ValueError, match="One task takes 2 MiB, more than the budget of 1 MiB"):
        stack_size_for(2**20, 2**21)


def peak_of(run) -> int:
    """The most bytes that tensors made while running took at once, by PyTorch's own record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    used = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak


@pytest.mark.parametrize("family", ["bert 0", "vit", "llama"])
@pytest.mark.parametrize("sam_rho", [0.0, 0.1])
def test_a_stack_stays_within_what_its_tasks_are_said_to_take(family: str, sam_rho: float) -> None:
    make, config = FAMILIES[family]
    backbone = make()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, config, backbone.head_name))
    texts, tasks = image_tasks() if backbone.reads_images else text_tasks()
    examples, start = stacked.encode(texts), initial_adapter(stacked.layout)
    settings = TrajectorySettings(num_steps=4, num_targets=2, batch_size=32, sam_rho=sam_rho)
    task = max(tasks, key=lambda one: len(one.classes))
    per_task = bytes_per_task(stacked, examples, task, settings)
    stack = [task] * 8
    collect_trajectories(
        stacked, examples, start, stacked.features_of_all(start, examples), stack, list(range(8)), settings
    )  # what is made once and kept
    torch.manual_seed(0)
    peak = peak_of(
        lambda: collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), stack, list(range(8)), settings
        )
    )
    assert peak <= 8 * per_task < 6 * peak
