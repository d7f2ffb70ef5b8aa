"""The denoiser: a transformer over an adapter's tokens."""

from dataclasses import astuple, dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from ..adapters.layout import AdapterLayout


@dataclass
class MCDiDenoiserOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(tasks, tokens, token_dim)`): What the scheduler's `prediction_type` names.
    """

    sample: torch.Tensor


class DenoiserBlock(nn.Module):
    """Self-attention and a feed-forward layer, both modulated by time and task (adaLN-zero, Peebles & Xie 2023).

    All blocks share the modulation but for a table of each block's own (Chen et al. 2024).
    """

    def __init__(self, dim: int, num_heads: int, ff_mult: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ff = nn.Sequential(nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Linear(ff_mult * dim, dim))
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, states: torch.Tensor, modulation: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (modulation + self.modulation).unsqueeze(2).unbind(dim=1)
        qkv = self.qkv(self.norm(states) * (1 + scale) + shift).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.transpose(1, 3).unbind(dim=2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + gate * self.out(attended.transpose(1, 2).flatten(2))
        return states + ff_gate * self.ff(self.norm(states) * (1 + ff_scale) + ff_shift)


class MCDiDenoiser(ModelMixin, ConfigMixin):
    """Predicts noise, sample or velocity of an adapter's tokens, given what [`TaskEncoder`] makes of a support set.

    A token knows its layer and module, and what the encoder proposes in its place. Class tokens have no index and take
    part in the attention, so the order of the classes does not matter.

    Args:
        tokens (`list[list[int]]`): For each token its layer, kind of module and filled width, see
            [`TokenCoordinates`].
        token_dim (`int`): Width of a token.
        cond_dim (`int`, *optional*, defaults to 256): Width of the condition's tokens.
        dim (`int`, *optional*, defaults to 256): Width of the transformer.
        num_layers (`int`, *optional*, defaults to 3): Number of blocks.
        num_heads (`int`, *optional*, defaults to 4): Attention heads of a block.
        ff_mult (`int`, *optional*, defaults to 2): Width of the feed-forward layer, in multiples of `dim`.
        residual (`bool`, *optional*, defaults to `True`): Whether the answer is added to the proposal, which suits a
            scheduler whose `prediction_type` is `"sample"`: an untrained denoiser then answers with the proposal.

    Example: `MCDiDenoiser.from_layout(codec.layout, cond_dim=256, dim=128)`
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DenoiserBlock"]
    _repeated_blocks = ["DenoiserBlock"]

    @register_to_config
    def __init__(
        self,
        tokens: list[list[int]],
        token_dim: int,
        cond_dim: int = 256,
        dim: int = 256,
        num_layers: int = 3,
        num_heads: int = 4,
        ff_mult: int = 2,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}: expected a divisor of dim, which is {dim}.")
        coordinates = torch.tensor(tokens)
        self.register_buffer("coordinates", coordinates[:, :2], persistent=False)
        self.register_buffer("filled", torch.arange(token_dim) < coordinates[:, 2:], persistent=False)
        sizes = [max(column) + 1 for column in list(zip(*tokens))[:2]]
        self.places = nn.ModuleList([nn.Embedding(size, dim) for size in sizes])
        self.token_in = nn.Linear(token_dim, dim)
        self.token_out = nn.Linear(dim, token_dim)
        self.time_proj = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.proposal_in = nn.Linear(token_dim, dim)
        self.class_in = nn.Linear(cond_dim, dim)
        self.task_in = nn.Linear(cond_dim, dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([DenoiserBlock(dim, num_heads, ff_mult) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(dim)
        self.gradient_checkpointing = False
        for layer in (self.modulation[1], self.token_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_layout(cls, layout: AdapterLayout, **sizes: int) -> "MCDiDenoiser":
        """The denoiser for a layout; `sizes` are the other arguments."""
        return cls(**cls.sizes_of(layout), **sizes)

    @staticmethod
    def sizes_of(layout: AdapterLayout) -> dict[str, int | list[list[int]]]:
        """The part of the config that a layout determines."""
        return {"tokens": [list(astuple(token)) for token in layout.tokens], "token_dim": layout.token_dim}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_tokens: torch.Tensor,
        task_token: torch.Tensor,
        proposal: torch.Tensor,
        class_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MCDiDenoiserOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(tasks, num_tokens, token_dim)`): Noised tokens; what lies behind a
                token's filled width is ignored.
            timestep (`torch.Tensor` of shape `()` or `(tasks,)`, or a number): The diffusion timestep.
            class_tokens (`torch.Tensor` of shape `(tasks, classes, cond_dim)`): From [`TaskEncoder`].
            task_token (`torch.Tensor` of shape `(tasks, cond_dim)`): From [`TaskEncoder`].
            proposal (`torch.Tensor` of shape `(tasks, num_tokens, token_dim)`): From [`TaskEncoder`].
            class_mask (`torch.Tensor` of shape `(tasks, classes)`, *optional*): False marks padding.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return no plain tuple.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        task = self.task_in(task_token)
        time = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        modulation = self.modulation(time + task).unflatten(-1, (6, -1))
        place = sum(table(index) for table, index in zip(self.places, self.coordinates.unbind(dim=1)))
        states = self.token_in(sample * self.filled) + place + self.proposal_in(proposal)
        states = torch.cat([states, self.class_in(class_tokens), task.unsqueeze(1)], dim=1)
        mask = None
        if class_mask is not None:
            mask = nn.functional.pad(class_mask, (len(self.coordinates), 1), value=True)[:, None, None, :]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                states = self._gradient_checkpointing_func(block, states, modulation, mask)
            else:
                states = block(states, modulation, mask)
        output = self.token_out(self.norm_out(states[:, : len(self.coordinates)]))
        output = (output + proposal if self.config.residual else output) * self.filled
        return MCDiDenoiserOutput(sample=output) if return_dict else (output,)
