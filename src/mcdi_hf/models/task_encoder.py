"""From the features of a support set to class tokens and a task token."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class TaskEncoderOutput(BaseOutput):
    """
    Args:
        class_tokens (`torch.Tensor` of shape `(tasks, classes, dim)`): One token a class, zero for padding.
        task_token (`torch.Tensor` of shape `(tasks, dim)`): One token for the task.
    """

    class_tokens: torch.Tensor
    task_token: torch.Tensor


class TaskEncoder(ModelMixin, ConfigMixin):
    """Encodes support sets of features of width `feature_dim` as tokens of width `dim`. The order of examples and the
    order of classes do not matter (Zaheer et al. 2017).

    A class's token is made from its mean feature, from the distance of that mean to the mean of all classes, from
    the examples one by one, and from how many examples there are.
    """

    @register_to_config
    def __init__(self, feature_dim: int = 384, dim: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim, elementwise_affine=False)
        self.example = nn.Sequential(nn.Linear(feature_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.prototype = nn.Linear(2 * feature_dim, dim)
        self.counts = nn.Linear(2, dim)
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.task = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor, return_dict: bool = True
    ) -> TaskEncoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encode features `(tasks, examples, feature_dim)`, what the head of the backbone reads of the support
        examples. Their labels `(tasks, examples)` count from 0, and -1 marks padding; False in the class mask
        `(tasks, classes)` does. Returned is a [`TaskEncoderOutput`] or a tuple.
        """
        member = (labels.unsqueeze(1) == torch.arange(class_mask.shape[1], device=labels.device)[:, None]).to(features)
        shots = member.sum(dim=-1, keepdim=True)
        member = member / shots.clamp(min=1)
        present = class_mask.unsqueeze(-1).to(features)
        ways = present.sum(dim=1, keepdim=True)
        means = member @ features
        centred = means - (means * present).sum(dim=1, keepdim=True) / ways
        prototypes = torch.cat([self.norm(means), self.norm(centred)], dim=-1)
        counts = torch.cat([shots.clamp(min=1).log(), ways.log().expand_as(shots)], dim=-1)
        tokens = member @ self.example(self.norm(features)) + self.prototype(prototypes) + self.counts(counts)
        tokens = (tokens + self.mix(tokens)) * present
        task = self.task(tokens.sum(dim=1) / ways.squeeze(1))
        if not return_dict:
            return tokens, task
        return TaskEncoderOutput(class_tokens=tokens, task_token=task)
