"""What a generator sees of a support set: its examples through the shared adapter, and where its loss would go."""

from dataclasses import replace

import torch

from ..data.episodes import SupportBatch, task_losses
from .head import RidgeHead, head_logits
from .stacked import StackedLora


@torch.enable_grad()
def see_support(
    stacked: StackedLora, shared: dict[str, torch.Tensor], head: RidgeHead, support: SupportBatch
) -> SupportBatch:
    """Fill in the `features` and the `gradients` of support sets, in one pass of their examples through the shared
    adapter, key on disk -> `(1, *shape)`, and back; no weight changes.

    An example's feature is what the head reads of it, over the head's `feature_norm`, beside the direction of its mean
    hidden state below the adapted layers: `(tasks, examples, feature_dim + hidden)`. The gradient is that of the loss
    of the examples, each under the head of the others, with respect to the coefficients z of the shared adapter,
    where all are 1: `(tasks, num_tokens, token_dim)`.
    """
    layout = stacked.layout
    shape = len(support), len(layout.modules), layout.token_dim
    ones = torch.ones(shape, device=stacked.device, requires_grad=True)
    features = stacked.features(layout.scaled(shared, ones), support.inputs())
    if stacked.backbone.is_causal_lm:
        logits = head_logits(features, *stacked.verbalizers(support), support.class_mask)
    else:
        logits = head.left_out_logits(features, support.labels, support.class_mask)
    (gradients,) = torch.autograd.grad(task_losses(logits, support.labels).sum(), ones)
    below = support.examples.means(support.plain_rows.flatten()).float().unflatten(0, support.labels.shape)
    below = torch.nn.functional.normalize(below, dim=-1)
    features = torch.cat([features.detach() / head.feature_norm, below], dim=-1)
    return replace(support, features=features, gradients=gradients)
