"""Sharpness-aware minimisation of a stack of adapters."""

import torch


def sam_perturbation(gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The step uphill of sharpness-aware minimisation, `rho * g / |g|`, for every task with a norm of its own.

    Foret et al. 2021, equation 2 with p = 2. The norm runs over all tensors of one adapter.

    Args:
        gradients (`list[torch.Tensor]`): Each of shape `(N, *shape)`.
        rho (`float`): The length of the step.

    Returns:
        Tensors of the same shapes; a task whose gradient is zero does not step.
    """
    norms = sum(value.flatten(1).square().sum(dim=1) for value in gradients).sqrt()
    scales = rho / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return [scales.view(-1, *[1] * (gradient.ndim - 1)) * gradient for gradient in gradients]
