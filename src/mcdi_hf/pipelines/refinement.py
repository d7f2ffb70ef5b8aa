"""A few gradient steps on the support, from where generation ended."""

import torch

from ..adapters.stacked import StackedLora
from .support import SupportBatch


@torch.enable_grad()
def refine(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    batch: SupportBatch,
    num_steps: int,
    learning_rate: float,
    words: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Train the adapters of some tasks on their support sets, all in one stack; none sees another's examples.

    Args:
        stacked ([`StackedLora`]): The frozen backbone.
        tensors (`dict[str, torch.Tensor]`): The adapters, key -> `(tasks, *shape)`.
        batch ([`SupportBatch`]): The support sets, with examples.
        num_steps (`int`): Adam's steps, each on the whole support, with a linear decay to zero.
        learning_rate (`float`): Adam's.
        words (`tuple`, *optional*): What stands in for the heads of a language model, see [`StackedLora.word_heads`].

    Returns:
        Key -> `torch.Tensor` of shape `(tasks, *shape)`.
    """
    trained = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    inputs = batch.examples[batch.plain_rows.flatten()]
    counts = (batch.labels >= 0).sum(dim=1)
    for _ in range(num_steps):
        logits = stacked.logits(trained, inputs, batch.class_mask, words)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, ignore_index=-1, reduction="none"
        )
        optimizer.zero_grad()
        (losses.sum(dim=1) / counts).sum().backward()
        optimizer.step()
        schedule.step()
    return {key: value.detach() for key, value in trained.items()}
