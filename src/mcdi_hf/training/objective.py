"""The local consistency loss over an adapter's tokens."""

from dataclasses import dataclass

import torch
from torch import nn

from ..data.episodes import SupportBatch
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler


# Each objective is a setting of the scheduler: with one segment only the last target is left, and with global starts
# every target is noised as if it were the last.
OBJECTIVES = {
    "mc": {"segment_starts": "local"},
    "mv": {"num_segments": 1, "segment_starts": "local"},
    "tw": {"segment_starts": "global"},
}


@dataclass
class TrainingBatch:
    """Draws from one task: the same local targets `(rows, targets, num_tokens, token_dim)`, each row with a support set
    of its own, as [`see_support`] saw it. `filled` `(num_tokens, token_dim)` says which numbers count.
    """

    targets: torch.Tensor
    filled: torch.Tensor
    support: SupportBatch

    def to(self, device: torch.device) -> "TrainingBatch":
        return TrainingBatch(self.targets.to(device), self.filled.to(device), self.support.to(device))


class ConditionalDenoiser(nn.Module):
    """What is meta-trained: the task encoder and the denoiser as one module."""

    def __init__(self, task_encoder: TaskEncoder, denoiser: MCDiDenoiser) -> None:
        super().__init__()
        self.task_encoder = task_encoder
        self.denoiser = denoiser

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, support: SupportBatch) -> torch.Tensor:
        """The denoiser's output for noised tokens `(rows, tokens, token_dim)` at timesteps `(rows,)`."""
        seen = self.task_encoder(support.features, support.gradients, support.labels, support.class_mask)
        known = seen.class_tokens, seen.task_token, seen.proposal
        return self.denoiser(sample, timesteps, *known, support.class_mask).sample


def local_consistency_loss(
    model: ConditionalDenoiser,
    scheduler: LocalConsistencyScheduler,
    batch: TrainingBatch,
    generator: torch.Generator | None = None,
    segment_weights: list[float] | None = None,
) -> torch.Tensor:
    """Mc-Di's loss, or Mv-Di's or Tw-Di's, as the scheduler is set: the mean of [`local_consistency_losses`], each
    segment weighted by `segment_weights`, by 1 without them."""
    losses, segments = local_consistency_losses(model, scheduler, batch, generator)
    if segment_weights is None:
        return losses.mean()
    if len(segment_weights) != scheduler.config.num_segments:
        raise ValueError(
            f"segment_weights are {segment_weights}: expected one for each of {scheduler.config.num_segments} segments."
        )
    return (losses * torch.tensor(segment_weights, device=losses.device)[segments - 1]).mean()


def local_consistency_losses(
    model: ConditionalDenoiser,
    scheduler: LocalConsistencyScheduler,
    batch: TrainingBatch,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The local consistency loss of every row of a batch, and the segment, from 1, that it is of: `(rows,)` each.

    For each row a segment, a timestep of it and noise are drawn; the scheduler noises the segment's target and says
    what the network must answer and with which weight (Guan et al., arXiv 2502.01117). Its `num_segments` are the
    number of targets, or 1 to learn from the last one only.
    """
    rows, count = batch.targets.shape[:2]
    segments = scheduler.config.num_segments
    if segments not in (1, count):
        raise ValueError(f"The scheduler has {segments} segments and a task {count} local targets: they must agree.")
    chosen = torch.randint(1, segments + 1, (rows,), generator=generator)
    timesteps = scheduler.sample_timesteps(chosen, generator=generator)
    noise = torch.randn(batch.targets[:, 0].shape, generator=generator)
    chosen, timesteps, noise = (tensor.to(batch.targets.device) for tensor in (chosen, timesteps, noise))
    targets = batch.targets[torch.arange(rows, device=chosen.device), chosen - 1 + count - segments]
    sample = scheduler.add_noise(targets, noise, timesteps, chosen)
    error = model(sample, timesteps, batch.support).float() - scheduler.get_target(targets, noise, timesteps, chosen)
    per_row = (error.square() * batch.filled).sum(dim=(1, 2)) / batch.filled.sum()
    return scheduler.get_loss_weight(timesteps, chosen) * per_row, chosen
