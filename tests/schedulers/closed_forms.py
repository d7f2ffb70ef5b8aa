"""What the tests of the scheduler share."""

import torch

from mcdi_hf import LocalConsistencyScheduler


PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_row(scheduler: LocalConsistencyScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of a segment and one of its timesteps: `(timesteps, segments)`."""
    pairs = [
        (t, i)
        for i, start in enumerate(scheduler.segment_boundaries.tolist(), start=1)
        for t in range(start, len(scheduler))
    ]
    timesteps, segments = torch.tensor(pairs).unbind(1)
    return timesteps, segments


def convert(scheduler: LocalConsistencyScheduler, epsilon: torch.Tensor, x: torch.Tensor, t: torch.Tensor):
    """What a network of the scheduler's prediction type answers if it believes in the noise `epsilon`, in float64."""
    level = scheduler.alphas_cumprod.double()[t].reshape(-1, *[1] * (x.ndim - 1))
    original = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
    velocity = level.sqrt() * epsilon - (1 - level).sqrt() * original
    return {"epsilon": epsilon, "sample": original, "v_prediction": velocity}[scheduler.config.prediction_type]
