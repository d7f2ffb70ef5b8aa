"""Logistic regression for many tasks at once: what generated adapters are compared with."""

import torch

from ..data.episodes import task_losses
from .head import Head, head_logits


@torch.enable_grad()
def fit_logistic(features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor, penalty: float = 1.0) -> Head:
    """Fit a linear head on the support of each task: summed cross-entropy plus half the squared weights.

    That is scikit-learn's `LogisticRegression` with `C = 1 / penalty`, for a stack of tasks at once.

    Args:
        features (`torch.Tensor` of shape `(tasks, examples, feature_dim)`): What the head reads.
        labels (`torch.Tensor` of shape `(tasks, examples)`): Classes from 0; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
        penalty (`float`, *optional*, defaults to 1.0): How much half the squared weights count; the bias is free.

    Returns:
        The weights `(tasks, classes, feature_dim)` and the biases `(tasks, classes)`.
    """
    weight = features.new_zeros(*class_mask.shape, features.shape[2], requires_grad=True)
    bias = features.new_zeros(class_mask.shape, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    counts = (labels >= 0).sum(dim=1)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        losses = task_losses(head_logits(features, weight, bias, class_mask), labels)
        loss = (losses * counts).sum() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()
