"""The head that comes for free: imprinted from the means of the support features."""

import torch


Head = tuple[torch.Tensor, torch.Tensor]  # weights `(tasks, classes, feature_dim)` and biases `(tasks, classes)`


def class_means(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The mean feature of every class: features `(tasks, examples, feature_dim)` and their labels `(tasks,
    examples)`, of which -1 marks padding, to `(tasks, num_classes, feature_dim)`, with zeros for a class without
    examples.
    """
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device).unsqueeze(-1)
    member = member.to(features.dtype)
    return member @ features / member.sum(dim=-1, keepdim=True).clamp(min=1)


def imprint_head(means: torch.Tensor, scale: float, class_mask: torch.Tensor | None = None) -> Head:
    """A linear head that classifies by the nearest class mean: weights `(tasks, classes, feature_dim)` and biases
    `(tasks, classes)`, zero for padding, from class means p_c of the weights' shape.

    The logit of class c is `-scale / 2 * |f - p_c|^2` up to a term that is the same for every class (Snell et al.
    2017, section 2.4). The mean of all class means is taken off the weights: it changes no probability, and leaves
    the generator with small, centred numbers. That is why the head needs its bias.
    """
    if class_mask is None:
        class_mask = torch.ones(means.shape[:2], dtype=torch.bool, device=means.device)
    present = class_mask.unsqueeze(-1).to(means.dtype)
    centre = (means * present).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True)
    weight = (means - centre) * present
    bias = -(weight * centre).sum(dim=-1) - weight.square().sum(dim=-1) / 2
    return scale * weight, scale * bias


def head_logits(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, class_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits `(tasks, examples, classes)` of a stack of heads, weights `(tasks, classes, feature_dim)` and
    biases `(tasks, classes)`, each on its own features `(tasks, examples, feature_dim)`. They are minus infinity
    for classes that `class_mask` `(tasks, classes)` says are padding.
    """
    logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
    return logits if class_mask is None else logits.masked_fill(~class_mask.unsqueeze(1), float("-inf"))
