"""Sharpness-aware minimisation of a stack of adapters."""

import torch


def sam_perturbation(gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The step uphill of sharpness-aware minimisation, `rho * g / |g|`, for every task of gradients `(N, *shape)`
    with a norm over all tensors of its own (Foret et al. 2021, equation 2 with p = 2). A task whose gradient is
    zero does not step.
    """
    norms = _norms(gradients)
    scales = rho / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return [gradient * _like(scales, gradient) for gradient in gradients]


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    return sum(value.flatten(1).square().sum(dim=1) for value in tensors).sqrt()


def _like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (tensor.ndim - 1))
