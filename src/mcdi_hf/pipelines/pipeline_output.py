"""What the pipeline returns."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..adapters.generated import GeneratedAdapter


@dataclass
class MCDiPipelineOutput(BaseOutput):
    """
    Args:
        adapters (`list[GeneratedAdapter]` or `torch.Tensor`):
            One a task; a tensor of shape `(tasks, numbers)` for `output_type="pt"` and of shape
            `(tasks, tokens, token_dim)` for `"latent"`.
    """

    adapters: list[GeneratedAdapter] | torch.Tensor
