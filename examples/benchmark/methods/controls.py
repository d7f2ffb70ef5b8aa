"""Controls that know training adapters but no task: noise around them, and samples of the Gaussian fitted to them."""

from typing import Any

import torch
from fold import Fold
from splits import Split, Tensors

from mcdi_hf import Task

from .base import Method
from .nearest import nearest_adapters


def noised(
    tensors: Tensors, reference: Tensors, relative_scale: float, noise: torch.Generator | None = None
) -> Tensors:
    """Add Gaussian noise to adapters, as wide, key by key, as training adapters lie around their mean.

    Args:
        tensors (`dict[str, torch.Tensor]`): The adapters, key -> `(adapters, *shape)`.
        reference (`dict[str, torch.Tensor]`): The training adapters, key -> `(training adapters, *shape)`.
        relative_scale (`float`): The noise's standard deviation over the training adapters' own, which is one number a
            key: the root mean square, over adapters and elements, of their difference from the mean adapter.
        noise (`torch.Generator`, *optional*): Draws the noise.
    """
    result = {}
    for key, value in tensors.items():
        deviation = (reference[key] - reference[key].mean(dim=0)).square().mean().sqrt()
        drawn = torch.randn(value.shape, generator=noise).to(value)
        result[key] = value + relative_scale * deviation.to(value) * drawn
    return result


def pca_samples(adapters: Tensors, num_samples: int, noise: torch.Generator | None = None) -> Tensors:
    """Sample adapters from the Gaussian that has the mean and the sample covariance of training adapters.

    Args:
        adapters (`dict[str, torch.Tensor]`): The training adapters, key -> `(training adapters, *shape)`.
        num_samples (`int`): How many to draw.
        noise (`torch.Generator`, *optional*): Draws the samples.

    Returns:
        Key -> `(num_samples, *shape)`.
    """
    flat = torch.cat([value.flatten(1) for value in adapters.values()], dim=1)
    mean = flat.mean(dim=0)
    # With `z` standard normal, `z (flat - mean) / sqrt(n - 1)` has just that covariance.
    draws = torch.randn(num_samples, len(flat), generator=noise).to(flat)
    samples = mean + draws @ (flat - mean) / (len(flat) - 1) ** 0.5
    parts = samples.split([value[0].numel() for value in adapters.values()], dim=1)
    return {key: part.unflatten(1, value.shape[1:]) for (key, value), part in zip(adapters.items(), parts)}


class NoisedNearest(Method):
    """Asks whether a generator does more than recall a training adapter and blur it; validation chooses the noise.

    See Zeng et al. 2025, "Generative Modeling of Weights: Generalization or Memorization?", arXiv 2506.07998.
    """

    group = "controls"
    needs_training = True

    def settings(self, split: Split, fold: Fold, shots: int) -> list[float]:
        return [0.1, 0.3, 1.0, 3.0]

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: float) -> list[float]:
        noise, nearest = torch.Generator().manual_seed(seed), nearest_adapters(split, fold, tasks)
        tensors = noised(nearest, fold.training.adapters, setting, noise)
        return split.imprinted(tensors, tasks, fold.codec.config.imprint_scale)


class GaussianSample(Method):
    """Asks whether knowing the task matters at all."""

    group = "controls"
    needs_training = True

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        noise = torch.Generator().manual_seed(seed)
        tensors = pca_samples(fold.training.adapters, len(tasks), noise)
        return split.imprinted(tensors, tasks, fold.codec.config.imprint_scale)
