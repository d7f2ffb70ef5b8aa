"""A few gradient steps on the support, from where generation ended."""

from dataclasses import replace

import torch

from ..adapters.generated import GeneratedAdapter
from ..adapters.stacked import StackedLora
from ..data.episodes import SupportBatch, task_losses
from .checks import check_finite
from .pipeline_output import MCDiPipelineOutput


@torch.enable_grad()
def train_on_support(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    support: SupportBatch,
    num_steps: int,
    learning_rate: float,
) -> dict[str, torch.Tensor]:
    """Train adapters with their heads, key on disk -> `(tasks, *shape)`, by Adam, each step on the whole support, with a
    linear decay to zero. The tasks are one stack, and none sees another's examples."""
    trained = {key: value.detach().to(stacked.device).clone().requires_grad_() for key, value in tensors.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for _ in range(num_steps):
        loss = task_losses(stacked.logits(trained, support), support.labels).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {key: value.detach() for key, value in trained.items()}


def refine_adapters(
    stacked: StackedLora, output: MCDiPipelineOutput, num_steps: int, learning_rate: float
) -> list[GeneratedAdapter]:
    """Train what the pipeline returned, see [`train_on_support`]."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: expected 1 or more.")
    if not 0 < learning_rate <= 1:
        raise ValueError(f"learning_rate is {learning_rate}: expected a number above 0, 1 at most.")
    adapters = []
    for support in output.draws.batches:
        part = output.adapters[len(adapters) :][: len(support)]
        tensors = stacked.layout.stack([one.tensors for one in part], support.class_mask.shape[1])
        trained = train_on_support(stacked, tensors, support, num_steps, learning_rate)
        check_finite(trained, first=len(adapters))
        for one, own in zip(part, stacked.layout.unstack(trained, [len(one.labels) for one in part])):
            details = replace(one.details, refine_steps=one.details.refine_steps + num_steps)
            adapters.append(replace(one, tensors=own, details=details))
    return adapters
