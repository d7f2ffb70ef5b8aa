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
    inner_loss: Callable[[nn.Module, int, int], torch.Tensor],
    inner_steps: int = 3,
    inner_learning_rate: float = 0.005,
    max_grad_norm: float | None = None,
    outer_loss: Callable[[nn.Module], torch.Tensor] | None = None,
) -> tuple[float, float]:
    """One outer step: a clone a task takes a few SGD steps, and the mean difference is the outer gradient.

    With `torch.optim.SGD(lr=zeta)` as the optimizer this is `phi <- phi + zeta / B * sum_i (phi_i - phi)` (Nichol et
    al. 2018); any other optimizer may take the difference. Each process runs its share of the tasks and one all-reduce
    adds them up, so the result does not depend on the number of processes. The model must not be wrapped in DDP, which
    would average the gradients of different tasks inside the inner loop.

    Args:
        accelerator (`Accelerator`): The run's.
        model (`nn.Module`): The unwrapped model, the same on every process.
        optimizer (`torch.optim.Optimizer`): The outer optimizer over `model.parameters()`.
        num_tasks (`int`): Tasks of this step, over all processes; 0 leaves the inner loop out.
        inner_loss (`Callable`): `(clone, task, inner_step) -> scalar`; the task counts from 0 over all processes.
        inner_steps (`int`, *optional*, defaults to 3): SGD steps of a clone. With 1 the difference is the gradient:
            training on a single level.
        inner_learning_rate (`float`, *optional*, defaults to 0.005): Their learning rate, the paper's eta.
        max_grad_norm (`float`, *optional*): Clip the outer gradient to this norm.
        outer_loss (`Callable`, *optional*): `(model) -> scalar`, a loss of the model itself; the sum over the
            processes counts. Its gradient is added as if the inner loops had followed it, too: `inner_steps *
            inner_learning_rate` times.

    Returns:
        The mean inner loss over tasks and steps, and the outer loss; 0 for one that is left out.

    Raises:
        `FloatingPointError`: when a loss or a gradient is not finite; the model is then as it was before.
    """
    parameters = list(model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters) + 2, device=accelerator.device)
    for task in range(accelerator.process_index, num_tasks, accelerator.num_processes):
        clone, loss = _inner_loop(accelerator, model, task, inner_loss, inner_steps, inner_learning_rate)
        difference = [(slow - fast).detach().flatten() for slow, fast in zip(parameters, clone.parameters())]
        total += torch.cat([*difference, loss[None], loss.new_zeros(1)]) / num_tasks
    if outer_loss is not None:
        with accelerator.autocast():
            loss = outer_loss(model)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradients = [inner_steps * inner_learning_rate * gradient.flatten() for gradient in gradients]
        loss = loss.detach().float()
        total += torch.cat([*gradients, loss.new_zeros(1), loss[None]])
    total = accelerator.reduce(total, reduction="sum")
    *pieces, inner, outer = total.split([*(parameter.numel() for parameter in parameters), 1, 1])
    if not torch.isfinite(total).all():
        raise FloatingPointError(
            f"Meta-training diverged: the inner loss is {inner.item()}, the outer loss {outer.item()}. Lower the inner "
            f"or the outer learning rate, or clip with max_grad_norm."
        )
    for parameter, piece in zip(parameters, pieces):
        parameter.grad = piece.view_as(parameter)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return inner.item(), outer.item()


def _inner_loop(
    accelerator: Accelerator,
    model: nn.Module,
    task: int,
    inner_loss: Callable[[nn.Module, int, int], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> tuple[nn.Module, torch.Tensor]:
    """A clone that took its steps on one task, and their mean loss."""
    clone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(clone.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        with accelerator.autocast():
            loss = inner_loss(clone, task, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float())
    return clone, torch.stack(losses).mean()
