"""Sharpness of the loss around the adapters of a stack: stepping away from it, and measuring it."""

from collections.abc import Callable

import torch


def sam_perturbation(gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The step uphill of sharpness-aware minimisation, `rho * g / |g|`, for every task with a norm of its own.

    Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization", equation 2 with p = 2.
    The norm runs over all tensors of one adapter.

    Args:
        gradients (`list[torch.Tensor]`): Each of shape `(N, *shape)`.
        rho (`float`): The length of the step.

    Returns:
        Tensors of the same shapes; a task whose gradient is zero does not step.
    """
    norms = _norms(gradients)
    scales = rho / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return [gradient * _like(scales, gradient) for gradient in gradients]


def largest_eigenvalues(
    losses: Callable[[list[torch.Tensor]], torch.Tensor],
    tensors: list[torch.Tensor],
    num_iterations: int = 20,
    seed: int = 0,
) -> torch.Tensor:
    """The Hessian's eigenvalue of largest magnitude at every adapter of a stack, by power iteration.

    No task's loss depends on another's adapter, so one product with the stack's Hessian is one with each of theirs.

    Args:
        losses (`Callable`): Tensors -> the losses of the tasks `(N,)`; twice differentiable.
        tensors (`list[torch.Tensor]`): Where the Hessian is taken, each of shape `(N, *shape)`.
        num_iterations (`int`, *optional*, defaults to 20): Products with the Hessian.
        seed (`int`, *optional*, defaults to 0): Of the first direction.

    Returns:
        `torch.Tensor` of shape `(N,)`: the Rayleigh quotients of the last direction.
    """
    generator = torch.Generator().manual_seed(seed)
    points = [value.detach().clone().requires_grad_() for value in tensors]
    vector = [torch.randn(value.shape, generator=generator).to(value) for value in points]
    # PyTorch's fused attention has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.autograd.grad(losses(points).sum(), points, create_graph=True)
    for _ in range(num_iterations):
        norms = _norms(vector).clamp(min=torch.finfo(vector[0].dtype).tiny)
        vector = [value / _like(norms, value) for value in vector]
        product = torch.autograd.grad(gradients, points, vector, retain_graph=True, materialize_grads=True)
        quotients = sum((left * right).flatten(1).sum(dim=1) for left, right in zip(vector, product))
        vector = list(product)
    return quotients.detach()


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    return sum(value.flatten(1).square().sum(dim=1) for value in tensors).sqrt()


def _like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (tensor.ndim - 1))
