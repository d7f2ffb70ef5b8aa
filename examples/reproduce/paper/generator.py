"""The generator of heads: what it sees, how it is trained on either level, and how it is sampled."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mcdi_hf import LocalConsistencyScheduler, MCDiDenoiser
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.objective import OBJECTIVES, TrainingBatch, local_consistency_losses
from mcdi_hf.training.reptile import reptile_step

from .heads import WAYS, Trajectories


# One batch of a single level, or as many rows of a few tasks in the inner steps of REPTILE.
BATCH, TASKS_PER_STEP, INNER_STEPS, INNER_LEARNING_RATE = 192, 4, 3, 0.005
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """One training: what it learns from, and how.

    Attributes:
        objective (`str`): `"mc"`, `"mv"` or `"tw"`, or `"mv_times"`, which is Mv-Di on the timesteps that Mc-Di draws.
        level (`str`): `"bi"` for REPTILE's two levels, `"single"` for one.
        seed (`int`): Of the network, its batches and its noise.
        coupled (`bool`): Whether a pair's noise is the start of its own trajectory.
        learning_rate (`float`), sam_rho (`float`): Those of the trajectories.
        num_segments (`int`), num_train_timesteps (`int`): k and T.
        steps (`int`): Of the outer optimiser.
    """

    objective: str = "mc"
    level: str = "single"
    seed: int = 0
    coupled: bool = False
    learning_rate: float = 0.2
    sam_rho: float = 0.05
    num_segments: int = 3
    num_train_timesteps: int = 20
    steps: int = 600

    def name(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in vars(self).values())


class PairScheduler(LocalConsistencyScheduler):
    """The library's scheduler for the two controls: Mv-Di on Mc-Di's timesteps, and noise that is a trajectory's own start.

    `others` draws the timesteps, and `starts`, one for each row of the batch to come, is the noise.
    """

    others: LocalConsistencyScheduler | None = None
    starts: torch.Tensor | None = None

    def sample_timesteps(self, segments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if self.others is None:
            return super().sample_timesteps(segments, generator)
        drawn = torch.randint(1, self.others.config.num_segments + 1, segments.shape, generator=generator)
        return self.others.sample_timesteps(drawn, generator)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        return super().add_noise(original_samples, noise if self.starts is None else self.starts, *where)

    def get_target(self, original_samples: torch.Tensor, noise: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        return super().get_target(original_samples, noise if self.starts is None else self.starts, *where)


def betas(count: int) -> list[float]:
    """The default schedule, whose T is 20, cut into `count` steps: its log levels, interpolated."""
    levels = torch.cat([torch.zeros(1), LocalConsistencyScheduler().alphas_cumprod.log()]).double().numpy()
    cut = np.interp(np.linspace(0, 1, count + 1), np.linspace(0, 1, len(levels)), levels)
    return (-np.expm1(np.diff(cut))).tolist()


def scheduler_of(setting: Setting) -> PairScheduler:
    shared = {"trained_betas": betas(setting.num_train_timesteps), "num_segments": setting.num_segments}
    scheduler = PairScheduler(**shared | OBJECTIVES[setting.objective.removesuffix("_times")])
    if setting.objective.endswith("_times"):
        scheduler.others = LocalConsistencyScheduler(**shared)
    return scheduler


class HeadGenerator(nn.Module):
    """The library's denoiser over the five rows of a head. Each row sees the mean feature of its class, and all of them
    the mean of these; no class has an index, and nothing is added to the answer."""

    def __init__(self, width: int = 256, num_layers: int = 3, feature_dim: int = 64) -> None:
        super().__init__()
        sizes = {"cond_dim": feature_dim, "dim": width, "num_layers": num_layers}
        tokens = [[0, 0, feature_dim + 1]] * WAYS
        self.denoiser = MCDiDenoiser(tokens=tokens, token_dim=feature_dim + 1, residual=False, **sizes)

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, support: SupportBatch) -> torch.Tensor:
        means = support.features  # one shot of a class: `(rows, 5, 64)`
        known = means[:, :0], means.mean(dim=1), nn.functional.pad(means, (0, 1))
        return self.denoiser(sample, timesteps, *known).sample


def support_of(features: torch.Tensor) -> SupportBatch:
    """One shot of every class, `(rows, 5, 64)`, as the objective takes it."""
    rows = len(features)
    mask = torch.ones(rows, WAYS, dtype=torch.bool)
    return SupportBatch(torch.arange(WAYS).expand(rows, -1), mask, features=features)


class Batches:
    """Draws of local targets beside one shot of each of their classes, any drawer, any view."""

    def __init__(
        self, features: torch.Tensor, trajectories: Trajectories, filled: torch.Tensor, coupled: bool
    ) -> None:
        self.features, self.classes, self.starts = features, trajectories.classes, trajectories.start
        self.targets = trajectories.targets
        self.filled, self.coupled = filled, coupled

    def draw(self, tasks: torch.Tensor, scheduler: PairScheduler, generator: torch.Generator) -> TrainingBatch:
        """A row for each of `tasks` `(rows,)`."""
        drawers, views = (
            torch.randint(self.features.shape[axis], (len(tasks), WAYS), generator=generator) for axis in (1, 2)
        )
        scheduler.starts = self.starts[tasks] if self.coupled else None
        support = support_of(self.features[self.classes[tasks], drawers, views].float())
        return TrainingBatch(self.targets[tasks], self.filled, support)


def train(
    setting: Setting,
    batches: Batches,
    model: nn.Module,
    on_step: Callable[[int], None] | None = None,
    rows: int = BATCH,
) -> None:
    """Train `model` in place; `on_step(step)` is called after each."""
    scheduler, generator = scheduler_of(setting), torch.Generator().manual_seed(setting.seed)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    bi = setting.level == "bi"
    count, inner = (TASKS_PER_STEP, INNER_STEPS) if bi else (1, 1)
    for step in range(1, setting.steps + 1):
        drawn = torch.randint(len(batches.targets), (count if bi else rows,), generator=generator)

        def loss(clone: nn.Module, task: int, inner_step: int, drawn: torch.Tensor = drawn) -> torch.Tensor:
            tasks = drawn[task].expand(rows // (count * inner)) if bi else drawn
            batch = batches.draw(tasks, scheduler, generator)
            with torch.autocast("cpu", torch.bfloat16):
                return local_consistency_losses(clone, scheduler, batch, generator)[0].mean()

        # With one clone that takes one step, what REPTILE follows is the gradient: a single level.
        reptile_step(accelerator, model, optimizer, count, loss, inner, INNER_LEARNING_RATE)
        schedule.step()
        if on_step is not None:
            on_step(step)


@torch.no_grad()
def sample(
    model: HeadGenerator,
    scheduler: LocalConsistencyScheduler,
    support: torch.Tensor,
    steps: int | None = None,
    temperature: float = 1.0,
    eta: float = 1.0,
    local_noise: LocalConsistencyScheduler | None = None,
    seed: int = 0,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """DDPM's steps from noise to a head for each task of `support` `(tasks, 5, 64)`: the chain `(steps + 1, tasks, 5, 65)`.

    `eta=0` makes them DDIM's. `temperature` scales the fresh noise of every step. With `local_noise`, the scheduler whose
    segments it is about, a step has the variance of its segment's own chain, see [`local_variance_ratio`].
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps or len(scheduler))
    shape = len(support), *model.denoiser.filled.shape
    chain, seen = [torch.randn(shape, generator=generator) if start is None else start], support_of(support)
    for timestep in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(chain[-1], timestep.expand(len(support)), seen).float()
        scale = temperature
        if local_noise is not None:
            scale *= local_variance_ratio(local_noise, int(timestep), scheduler.previous_timestep(timestep)) ** 0.5
        noise = scale * torch.randn(shape, generator=generator)
        chain.append(scheduler.step(output, timestep, chain[-1], eta=eta, variance_noise=noise).prev_sample)
    return torch.stack(chain)


def local_variance_ratio(scheduler: LocalConsistencyScheduler, timestep: int, previous: int) -> float:
    """The variance of a step in its segment's own chain over that in the whole chain.

    DDPM's posterior variance is (1 - abar[t - 1]) / (1 - abar[t]) (1 - alpha_t). In the chain that ends on the target
    of segment i, abar_i stands in place of abar; a step that leaves the segment adds no noise.
    """
    boundary = int(max(b for b in scheduler.segment_boundaries if b <= timestep))
    levels = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()
    start, level, before = levels[boundary], levels[timestep + 1], levels[max(previous, boundary - 1) + 1]
    ratio = ((start - before) / (start - level)) / ((1 - before) / (1 - level)) if before < 1 else torch.zeros(())
    return float(ratio)
