"""The bi-level step of REPTILE under Accelerate."""

import copy
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn


def reptile_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_tasks: int,
    task_loss: Callable[[nn.Module, int, int], torch.Tensor],
    inner_steps: int = 3,
    inner_learning_rate: float = 0.005,
    max_grad_norm: float | None = None,
) -> float:
    """One outer step: a clone a task takes a few SGD steps, and the mean difference is the outer gradient.

    With `torch.optim.SGD(lr=zeta)` as the optimizer this is `phi <- phi + zeta / B * sum_i (phi_i - phi)` (Nichol et
    al. 2018); any other optimizer may take the difference. Each process runs its share of the tasks and one all-reduce
    adds them up, so the result does not depend on the number of processes. The model must not be wrapped in DDP, which
    would average the gradients of different tasks inside the inner loop.

    Args:
        accelerator (`Accelerator`):
            The run's.
        model (`nn.Module`):
            The unwrapped model, the same on every process.
        optimizer (`torch.optim.Optimizer`):
            The outer optimizer over `model.parameters()`.
        num_tasks (`int`):
            Tasks of this step, over all processes.
        task_loss (`Callable`):
            `(clone, task, inner_step) -> scalar`; the task counts from 0 over all processes.
        inner_steps (`int`, *optional*, defaults to 3):
            SGD steps of a clone.
        inner_learning_rate (`float`, *optional*, defaults to 0.005):
            Their learning rate, the paper's eta.
        max_grad_norm (`float`, *optional*):
            Clip the outer gradient to this norm.

    Returns:
        The mean inner loss over tasks and steps.

    Raises:
        `FloatingPointError`: when the loss or a weight is no longer finite; the model is then as it was before.
    """
    parameters = list(model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1, device=accelerator.device)
    for task in range(accelerator.process_index, num_tasks, accelerator.num_processes):
        clone = copy.deepcopy(model)
        inner = torch.optim.SGD(clone.parameters(), lr=inner_learning_rate)
        losses = []
        for step in range(inner_steps):
            with accelerator.autocast():
                loss = task_loss(clone, task, step)
            inner.zero_grad()
            loss.backward()
            inner.step()
            losses.append(loss.detach().float())
        difference = [(slow - fast).flatten() for slow, fast in zip(parameters, clone.parameters())]
        total += torch.cat([*difference, torch.stack(losses).mean()[None]]).detach() / num_tasks
    total = accelerator.reduce(total, reduction="sum")
    if not torch.isfinite(total).all():
        raise FloatingPointError(
            f"Meta-training diverged: the loss is {total[-1].item()}. Lower the inner or the outer learning rate."
        )
    *pieces, loss = total.split([*(parameter.numel() for parameter in parameters), 1])
    for parameter, piece in zip(parameters, pieces):
        parameter.grad = piece.view_as(parameter)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
