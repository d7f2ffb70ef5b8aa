"""The head that comes for free: ridge regression on the support features, in closed form."""

from dataclasses import dataclass

import torch


Head = tuple[torch.Tensor, torch.Tensor]  # weights `(tasks, classes, feature_dim)` and biases `(tasks, classes)`


@dataclass
class RidgeHead:
    """Makes linear heads by ridge regression on labelled features, many tasks at once and differentiably (R2-D2,
    Bertinetto et al. 2019).

    With `X` the n features of a task's examples over `feature_norm`, less their mean, and `Y` their classes one-hot,
    less 1 / C: `W = X^T (X X^T + lambda I)^-1 Y` with `lambda = exp(log_ridge + log_ridge_shots * log(n / C))`, and the
    logits of a feature q are `exp(log_scale) * (q / feature_norm - mean) W`. With one example a class the head does
    what prototypes do, with many what logistic regression does.

    Args:
        log_scale, log_ridge, log_ridge_shots (`float` or `torch.Tensor` of shape `()`): The three scalars, learnt with
            the shared start as tensors.
        feature_norm (`float`): The common norm of the features, so that the scalars mean the same for any backbone.

    Example:
        >>> weight, bias = RidgeHead()(features, labels, class_mask)
    """

    log_scale: float | torch.Tensor = 2.0
    log_ridge: float | torch.Tensor = 0.0
    log_ridge_shots: float | torch.Tensor = 0.0
    feature_norm: float = 1.0

    def __call__(self, features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor) -> Head:
        """The heads for features `(tasks, examples, feature_dim)` with labels `(tasks, examples)`, where -1 marks
        padding; False in `class_mask` `(tasks, classes)` does. They are float32, zero for classes that are padding.
        """
        with torch.autocast(features.device.type, enabled=False):
            centred, mean, targets, ridge = self._centred(features, labels, class_mask)
            weight = _ridge_regression(centred, targets, ridge)[0].transpose(1, 2) * self._scale(features)
            bias = -(weight @ mean.unsqueeze(-1)).squeeze(-1)
            return weight / self.feature_norm, bias

    def left_out_logits(self, features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor) -> torch.Tensor:
        """The logits `(tasks, examples, classes)` of every example under the head of the others, minus infinity for
        padding classes; the arguments are those of a call.

        The mean that is taken off and lambda stay those of all. In a task with a class of one example, which cannot be
        left out, the logits are those under the head of all.
        """
        with torch.autocast(features.device.type, enabled=False):
            centred, _, targets, ridge = self._centred(features, labels, class_mask)
            weight, residual, rest = _ridge_regression(centred, targets, ridge)
            alone = ((targets > 0).sum(dim=1) == 1).any(dim=1)
            left_out = targets - residual / rest.unsqueeze(-1)
            logits = torch.where(alone[:, None, None], centred @ weight, left_out) * self._scale(features)
            return logits.masked_fill(~class_mask.unsqueeze(1), float("-inf"))

    def _centred(self, features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor) -> tuple:
        """X, the mean that is taken off, Y, and lambda `(tasks,)`; the rows of padded examples are zero."""
        features = features.float() / self.feature_norm
        known, counts = (labels >= 0).unsqueeze(-1), class_mask.sum(dim=1)
        mean = (features * known).sum(dim=1) / known.sum(dim=1)
        centred = (features - mean.unsqueeze(1)) * known
        classes = torch.arange(class_mask.shape[1], device=labels.device)
        targets = (labels.unsqueeze(-1) == classes).float() - (class_mask / counts.unsqueeze(-1)).unsqueeze(1)
        shots = known.sum(dim=(1, 2)) / counts
        return centred, mean, targets * known, torch.exp(self.log_ridge + self.log_ridge_shots * shots.log())

    def _scale(self, features: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.log_scale, device=features.device).exp()


def _ridge_regression(
    centred: torch.Tensor, targets: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`W` `(tasks, feature_dim, classes)`, and for every example two numbers whose ratio is the error of its prediction
    by the others (Allen 1974): its residual and one less its leverage, both up to one factor.

    The system that is solved is as large as there are examples or features, whichever are fewer. Features that are not
    finite make a `W` that is not, and no error here.
    """
    system = centred @ centred.mT if centred.shape[1] <= centred.shape[2] else centred.mT @ centred
    identity = torch.eye(system.shape[1], device=system.device)
    inverse = torch.linalg.inv_ex(system + ridge[:, None, None] * identity).inverse
    if centred.shape[1] <= centred.shape[2]:
        residual = inverse @ targets
        return centred.mT @ residual, residual, inverse.diagonal(dim1=1, dim2=2)
    seen = centred @ inverse
    weight = inverse @ (centred.mT @ targets)
    return weight, targets - centred @ weight, 1 - (seen * centred).sum(dim=2)


def head_logits(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, class_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits `(tasks, examples, classes)` of a stack of heads, weights `(tasks, classes, feature_dim)` and
    biases `(tasks, classes)`, each on its own features `(tasks, examples, feature_dim)`. They are minus infinity
    for classes that `class_mask` `(tasks, classes)` says are padding.
    """
    logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
    return logits if class_mask is None else logits.masked_fill(~class_mask.unsqueeze(1), float("-inf"))
