"""A few gradient steps on the support, from where generation ended."""

import torch

from ..adapters.stacked import StackedLora
from ..data.episodes import SupportBatch, task_losses


@torch.enable_grad()
def refine_adapters(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    support: SupportBatch,
    num_steps: int,
    learning_rate: float,
) -> dict[str, torch.Tensor]:
    """Train the adapters of some tasks on their support sets, all in one stack; none sees another's examples.

    Args:
        stacked ([`StackedLora`]): The frozen backbone.
        tensors (`dict[str, torch.Tensor]`): The adapters, key -> `(tasks, *shape)`.
        support ([`SupportBatch`]): The support sets, with examples.
        num_steps (`int`): Adam's steps, each on the whole support, with a linear decay to zero.
        learning_rate (`float`): Adam's.

    Returns:
        Key -> `torch.Tensor` of shape `(tasks, *shape)`.
    """
    trained = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for _ in range(num_steps):
        loss = task_losses(stacked.logits(trained, support), support.labels).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {key: value.detach() for key, value in trained.items()}
