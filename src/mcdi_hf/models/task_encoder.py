"""From what a generator sees of a support set to class tokens, a task token and a first guess of the weights."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


SMALLEST = 1e-4  # of a variance along a learnt direction: its logarithm would drown the others


@dataclass
class TaskEncoderOutput(BaseOutput):
    """
    Args:
        class_tokens (`torch.Tensor` of shape `(tasks, classes, dim)`): One token a class, zero for padding.
        task_token (`torch.Tensor` of shape `(tasks, dim)`): One token for the task.
        proposal (`torch.Tensor` of shape `(tasks, num_tokens, token_dim)`): A first guess of the adapter's tokens.
        prototype_logits (`torch.Tensor` of shape `(tasks, num_prototypes)`): Which of the prototypes the task is like.
    """

    class_tokens: torch.Tensor
    task_token: torch.Tensor
    proposal: torch.Tensor
    prototype_logits: torch.Tensor


class TaskEncoder(ModelMixin, ConfigMixin):
    """Encodes support sets as tokens of width `dim`. The order of examples and the order of classes do not matter.

    The task's token is made of statistics that say which directions tell the classes apart: along `num_directions`
    learnt directions the variance between class means, that within classes, and the mean; and of what examples and
    class means have in common. With it and the gradient of the support's loss (Grad2Task, Wang et al. 2021) it is said which
    of the prototypes, adapters of training sources, the task is like. The proposal is their mean, so weighted, and a
    correction made of the same, in which the gradient has a linear way of its own: a learnt step downhill. It is zero
    before any training.

    Args:
        feature_dim (`int`): Width of what is seen of an example, see [`see_support`].
        num_tokens, token_dim (`int`): The number and the width of an adapter's tokens.
        dim (`int`, *optional*, defaults to 256): Width of the tokens that are made.
        num_directions (`int`, *optional*, defaults to 192): How many directions are learnt.
        num_prototypes (`int`, *optional*, defaults to 1): How many prototypes there are.

    Example: `encoder(seen.features, seen.gradients, seen.labels, seen.class_mask).proposal` for `seen =
    pipe.encode_support(support)`
    """

    @register_to_config
    def __init__(
        self,
        feature_dim: int,
        num_tokens: int,
        token_dim: int,
        dim: int = 256,
        num_directions: int = 192,
        num_prototypes: int = 1,
    ) -> None:
        super().__init__()
        numbers = num_tokens * token_dim
        self.directions = nn.Linear(feature_dim, num_directions, bias=False)
        self.class_mean = _mlp(num_directions, dim, dim)
        self.example = _mlp(num_directions, dim, dim)
        self.statistics = _mlp(3 * num_directions + dim + 2, 2 * dim, dim)
        self.gradient = nn.Linear(numbers, dim)
        self.propose = nn.Sequential(nn.Linear(2 * dim + 1, 2 * dim), nn.GELU(), _mlp(2 * dim, 2 * dim, numbers))
        self.downhill = nn.Linear(numbers, numbers)
        self.recall = _mlp(2 * dim + 1, 2 * dim, num_prototypes)
        self.prototypes = nn.Parameter(torch.zeros(num_prototypes, num_tokens, token_dim))
        for layer in (self.propose[-1][-1], self.downhill):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def rescale(self, factors: torch.Tensor) -> None:
        """Multiply every proposal by `factors` `(num_tokens, token_dim)`, as a change of the codec's scales asks for."""
        for layer in (self.propose[-1][-1], self.downhill):
            layer.weight.mul_(factors.reshape(-1, 1))
            layer.bias.mul_(factors.flatten())
        self.prototypes.mul_(factors)

    def forward(
        self,
        features: torch.Tensor,
        gradients: torch.Tensor,
        labels: torch.Tensor,
        class_mask: torch.Tensor,
        return_dict: bool = True,
    ) -> TaskEncoderOutput | tuple[torch.Tensor, ...]:
        """Encode what [`see_support`] makes of support sets.

        Args:
            features (`torch.Tensor` of shape `(tasks, examples, feature_dim)`): What is seen of each example.
            gradients (`torch.Tensor` of shape `(tasks, num_tokens, token_dim)`): Those of the support's loss.
            labels (`torch.Tensor` of shape `(tasks, examples)`): Classes from 0; -1 marks padding.
            class_mask (`torch.Tensor` of shape `(tasks, classes)`): False marks padding.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return no plain tuple.
        """
        member = (labels.unsqueeze(1) == torch.arange(class_mask.shape[1], device=labels.device)[:, None]).to(features)
        shots = member.sum(dim=-1, keepdim=True)
        member = member / shots.clamp(min=1)
        present = class_mask.unsqueeze(-1).to(features)
        ways = present.sum(dim=1)
        known = (labels >= 0).unsqueeze(-1).to(features)
        seen = self.directions(features)
        means = member @ seen
        mean = (means * present).sum(dim=1) / ways
        centred = (means - mean.unsqueeze(1)) * present
        own = member.transpose(1, 2) @ means  # the mean of each example's class; zero for padding
        between = centred.square().sum(dim=1) / ways
        within = ((seen - own).square() * known).sum(dim=1) / known.sum(dim=1)
        between, within = between.clamp(min=SMALLEST).log(), within.clamp(min=SMALLEST).log()
        agreement = (seen - mean.unsqueeze(1)) * (own - mean.unsqueeze(1)) * known
        class_tokens = (self.class_mean(centred) + member @ self.example(agreement)) * present
        counts = [shots.sum(dim=1).div(ways).log(), ways.log()]
        statistics = [between - within, between, mean, class_tokens.sum(dim=1) / ways, *counts]
        task_token = self.statistics(torch.cat(statistics, dim=-1))
        flat = gradients.flatten(1)
        norm = flat.norm(dim=1, keepdim=True).clamp(min=1e-8)
        flat = flat / norm * flat.shape[1] ** 0.5
        known = torch.cat([task_token, self.gradient(flat), norm.log()], dim=-1)
        prototype_logits = self.recall(known)
        recalled = prototype_logits.softmax(dim=-1) @ self.prototypes.flatten(1)
        proposal = (recalled + self.propose(known) + self.downhill(flat)).view_as(gradients)
        found = class_tokens, task_token, proposal, prototype_logits
        return TaskEncoderOutput(*found) if return_dict else found


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
