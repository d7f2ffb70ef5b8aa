"""A control that knows training adapters but no task: noise around the nearest of them."""

import torch
from fold import Fold
from splits import Split

from mcdi_hf import Task

from .base import Method
from .nearest import nearest_coefficients


def noised(
    coefficients: torch.Tensor, reference: torch.Tensor, relative_scale: float, noise: torch.Generator | None = None
) -> torch.Tensor:
    """Add Gaussian noise to adapters' coefficients, as wide, token by token, as training adapters lie around their mean.

    Args:
        coefficients (`torch.Tensor` of shape `(adapters, num_tokens, token_dim)`): The adapters'.
        reference (`torch.Tensor` of shape `(training adapters, num_tokens, token_dim)`): The training adapters'.
        relative_scale (`float`): The noise's standard deviation over the training adapters' own, which is one number a
            token: the root mean square, over adapters and elements, of their difference from the mean.
        noise (`torch.Generator`, *optional*): Draws the noise.
    """
    deviation = (reference - reference.mean(dim=0)).square().mean(dim=(0, 2), keepdim=True).sqrt()
    drawn = torch.randn(coefficients.shape, generator=noise).to(coefficients)
    return coefficients + relative_scale * deviation * drawn


class NoisedNearest(Method):
    """Asks whether a generator does more than recall a training adapter and blur it; validation chooses the noise.

    See Zeng et al. 2025, "Generative Modeling of Weights: Generalization or Memorization?", arXiv 2506.07998.
    """

    group = "controls"
    needs_training = True

    def settings(self, split: Split, fold: Fold, shots: int) -> list[float]:
        return [0.1, 0.3, 1.0, 3.0]

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: float) -> list[float]:
        noise, nearest = torch.Generator().manual_seed(seed), nearest_coefficients(split, fold, tasks)
        made = noised(nearest, fold.training.coefficients, setting, noise)
        return split.headed(fold.codec.matrices(made), tasks)
