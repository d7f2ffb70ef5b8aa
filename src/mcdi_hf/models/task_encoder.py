"""From what a generator sees of a support set to class tokens, weight tokens and a task token."""

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
        weight_tokens (`torch.Tensor` of shape `(tasks, num_tokens, dim)`): One token for each of an adapter's.
    """

    class_tokens: torch.Tensor
    task_token: torch.Tensor
    weight_tokens: torch.Tensor


class TaskEncoder(ModelMixin, ConfigMixin):
    """Encodes support sets as tokens of width `dim`. The order of examples and the order of classes do not matter.

    The task's token is made of statistics that say which directions tell the classes apart: along `num_directions`
    learnt directions the variance between class means, that within classes, and the mean; and of what examples and
    class means have in common. A weight token is made of the gradient of the support's loss there (Grad2Task, Wang et
    al. 2021).

    Args:
        feature_dim (`int`, *optional*, defaults to 768): Width of what is seen of an example, see [`see_support`].
        token_dim (`int`, *optional*, defaults to 8): Width of an adapter's tokens.
        dim (`int`, *optional*, defaults to 256): Width of the tokens that are made.
        num_directions (`int`, *optional*, defaults to 192): How many directions are learnt.
    """

    @register_to_config
    def __init__(self, feature_dim: int = 768, token_dim: int = 8, dim: int = 256, num_directions: int = 192) -> None:
        super().__init__()
        self.directions = nn.Linear(feature_dim, num_directions, bias=False)
        self.class_mean = _mlp(num_directions, dim, dim)
        self.example = _mlp(num_directions, dim, dim)
        self.statistics = _mlp(3 * num_directions + dim + 2, 2 * dim, dim)
        self.gradient = _mlp(token_dim + 1, dim, dim)

    def forward(
        self,
        features: torch.Tensor,
        gradients: torch.Tensor,
        labels: torch.Tensor,
        class_mask: torch.Tensor,
        return_dict: bool = True,
    ) -> TaskEncoderOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        norm = gradients.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]
        size = gradients.shape[1] * gradients.shape[2]
        scaled = torch.cat([gradients / norm * size**0.5, norm.log().expand(-1, gradients.shape[1], 1)], dim=-1)
        weight_tokens = self.gradient(scaled)
        if not return_dict:
            return class_tokens, task_token, weight_tokens
        return TaskEncoderOutput(class_tokens=class_tokens, task_token=task_token, weight_tokens=weight_tokens)


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
