"""The rival of many shots: logistic regression on the features of the frozen backbone."""

import torch

from ..adapters.head import head_logits
from ..episodes import Episodes
from ..tasks import Task


def fit_logistic(
    features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor, penalty: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
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

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        logits = head_logits(features, weight, bias, class_mask)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="sum")
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()


def logistic_accuracies(
    features: torch.Tensor, tasks: list[Task], tasks_at_once: int = 16, penalty: float = 1.0
) -> list[float]:
    """The accuracy of [`fit_logistic`] on the queries of tasks, its features scaled to unit variance.

    Args:
        features (`torch.Tensor` of shape `(rows, feature_dim)`): What the head of the frozen backbone reads.
        tasks (`list[Task]`): The tasks.
        tasks_at_once (`int`, *optional*, defaults to 16): Tasks of a stack.
        penalty (`float`, *optional*, defaults to 1.0): As in [`fit_logistic`].
    """
    features = features - features.mean(dim=0)
    features = features / features.square().mean().sqrt()
    found = []
    for first in range(0, len(tasks), tasks_at_once):
        episodes = Episodes.of(tasks[first : first + tasks_at_once], features.device)
        head = fit_logistic(features[episodes.support], episodes.labels, episodes.class_mask, penalty)
        found += episodes.accuracies(head_logits(features[episodes.query], *head, episodes.class_mask))
    return found
