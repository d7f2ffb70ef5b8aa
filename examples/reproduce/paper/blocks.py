"""The last block of the Conv-4 and the head together: their trajectories, their generator and what they are worth."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from mcdi_hf import MCDiDenoiser
from mcdi_hf.data.episodes import SupportBatch

from .conv4 import CHANNELS
from .generator import Setting
from .heads import WAYS, Episodes, Trajectories, descend, logits


MAP = 9 * CHANNELS  # what block 3 leaves of an image: 64 channels of 3 x 3
TOKENS = CHANNELS + WAYS  # a filter of 64 x 3 x 3 each, and a row of the head each
AT_ONCE = 50


def filled() -> torch.Tensor:
    """Which numbers of the tokens count, `(69, 576)`: all of a filter, 65 of a row of the head."""
    mask = torch.ones(TOKENS, MAP)
    mask[CHANNELS:, CHANNELS + 1 :] = 0
    return mask


def block_features(weights: torch.Tensor, support: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """What the blocks of `weights` `(tasks, 69, 576)` make of `maps` `(tasks, rows, 576)`: `(tasks, rows, 64)`.

    Convolution, batch norm, ReLU and pooling, as in the Conv-4. The norm takes its statistics from the tasks' `support`,
    `(tasks, shots, 576)`, whatever is to be classified, and has no scale of its own.
    """
    known, states = (_convolve(weights, some) for some in (support, maps))
    mean, variance = known.mean(dim=(1, 2), keepdim=True), known.var(dim=(1, 2), keepdim=True)
    states = ((states - mean) / (variance + 1e-5).sqrt()).relu()
    return states[:, :, [0, 1, 3, 4]].amax(dim=2)  # 2 x 2 pooling of 3 x 3 leaves one place


def _convolve(weights: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """`(tasks, rows, 9 places, 64 channels)`."""
    tasks, rows = maps.shape[:2]
    patches = functional.unfold(maps.reshape(tasks * rows, CHANNELS, 3, 3).float(), 3, padding=1)
    patches = patches.transpose(1, 2).reshape(tasks, rows * 9, MAP)
    return (patches @ weights[:, :CHANNELS].transpose(1, 2)).unflatten(1, (rows, 9))


def block_logits(weights: torch.Tensor, support: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """The classes of `maps` by block and head: `(tasks, rows, 5)`."""
    return logits(weights[:, CHANNELS:, : CHANNELS + 1], block_features(weights, support, maps))


def optimise_blocks(maps: torch.Tensor, tasks: int, shared_block: bool) -> Trajectories:
    """As [`optimise`] of heads, for blocks with their heads, from starts of variance 1. With `shared_block` all tasks
    start from the same block, and each from a head of its own."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.rand(tasks, len(maps), generator=generator).topk(WAYS).indices
    start = torch.randn(tasks, TOKENS, MAP, generator=generator) * filled()
    if shared_block:
        start[:, :CHANNELS] = start[:1, :CHANNELS].clone()
    usual = Setting()
    how = _gradient, usual.learning_rate, usual.sam_rho, usual.num_segments, generator
    parts = zip(start.split(AT_ONCE), classes.split(AT_ONCE))
    return Trajectories(classes, start, torch.cat([descend(some, maps, named, *how) for some, named in parts]))


def _gradient(weights: torch.Tensor, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weights = weights.detach().requires_grad_()
    found = block_logits(weights, batch, batch).transpose(1, 2)
    loss = functional.cross_entropy(found, labels.expand(len(batch), -1), reduction="sum") / len(labels)
    return torch.autograd.grad(loss, weights)[0]


class BlockEpisodes(Episodes):
    """[`Episodes`] of maps: `support` `(tasks, 5, 576)`, `query` `(tasks, queries, 576)`, `labels` `(queries,)`."""

    def accuracies(self, weights: torch.Tensor) -> torch.Tensor:
        """By block and head, `(tasks,)`."""
        return self._judge(weights, block_logits)

    def accuracies_of_features(self, weights: torch.Tensor) -> torch.Tensor:
        """By the block and the nearest shot: what the block is worth without its head, `(tasks,)`."""

        def nearest(weights: torch.Tensor, support: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
            shots, rows = (block_features(weights, support, some) for some in (support, maps))
            return -torch.cdist(rows, shots)

        return self._judge(weights, nearest)

    def _judge(self, weights: torch.Tensor, classify: Callable) -> torch.Tensor:
        parts = zip(weights.split(AT_ONCE), self.support.split(AT_ONCE), self.query.split(AT_ONCE))
        found = torch.cat([classify(*part).argmax(dim=-1) for part in parts])
        return (found == self.labels).float().mean(dim=1)


class BlockGenerator(nn.Module):
    """The library's denoiser over 64 filters and five rows of a head. A row sees the map of its class's shot.

    Each token is wider than the network, so a learnt multiple of it for each timestep goes past; it starts as what is
    the noise of a sample of variance 1, at the levels `alphas_cumprod` `(timesteps,)`.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, width: int = 128, num_layers: int = 3) -> None:
        super().__init__()
        tokens = [[place, 0, MAP] for place in range(CHANNELS)] + [[0, 1, CHANNELS + 1]] * WAYS
        sizes = {"cond_dim": MAP, "dim": width, "num_layers": num_layers}
        self.denoiser = MCDiDenoiser(tokens=tokens, token_dim=MAP, residual=False, **sizes)
        self.past = nn.Parameter((1 - alphas_cumprod).sqrt())

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, support: SupportBatch) -> torch.Tensor:
        maps = support.features
        proposal = functional.pad(maps, (0, 0, CHANNELS, 0))
        known = maps[:, :0], maps.mean(dim=1), proposal
        past = self.past[timesteps, None, None] * sample * self.denoiser.filled
        return past + self.denoiser(sample, timesteps, *known).sample
