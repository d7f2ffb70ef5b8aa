"""Local consistency diffusion on a toy that fits in a picture: a task's "weights" are a point in the plane.

    python examples/toy_2d.py --output toy_2d.png

Each task is a loss with its minimum somewhere on a circle. Gradient descent from one shared start is its optimisation;
the points after a third and two thirds of the steps and at the end are its local targets. A small network learns with
REPTILE to take noise away, so that every segment of the chain ends on a local target. The chain of an unseen task then
passes near the targets in turn: not through the early ones, since their timesteps are those of later segments, too.
Plain diffusion (`num_segments=1`) learns the end alone; its chain passes the first two targets at twice the distance.
"""

import argparse

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import trange

from mcdi_hf import LocalConsistencyScheduler
from mcdi_hf.training.reptile import reptile_step


OPTIMISER_STEPS, NUM_TARGETS, TASKS_PER_STEP, ROWS = 30, 3, 4, 128
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind readers, too


def optimiser_path(angles: torch.Tensor) -> torch.Tensor:
    """Gradient descent with a warm-up down a valley that bends, `(tasks,)` -> `(tasks, OPTIMISER_STEPS + 1, 2)`."""
    turns = angles.unsqueeze(-1) + torch.tensor([-0.25, 0.25]) * torch.pi
    axes = torch.stack([turns.cos(), turns.sin()], dim=-1)  # of the quadratic loss: one steep, one flat
    left = torch.ones_like(turns)  # of the way to the minimum, by axis
    path = [left]
    for step in range(OPTIMISER_STEPS):
        gradient = torch.tensor([0.58, 0.19]) * path[-1]
        path.append(path[-1] - (step + 1) / OPTIMISER_STEPS * gradient)
    return 1.3 * torch.einsum("stn,tnd->tsd", 1 - torch.stack(path), axes)


def local_targets(angles: torch.Tensor) -> torch.Tensor:
    """`(tasks,)` -> `(tasks, NUM_TARGETS, 2)`."""
    return optimiser_path(angles)[:, OPTIMISER_STEPS // NUM_TARGETS :: OPTIMISER_STEPS // NUM_TARGETS]


class Denoiser(nn.Module):
    """Answers noised points `(rows, 2)`, their timesteps and their tasks' angles with what the scheduler asks for."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [5, width, width, width]
        hidden = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        condition = torch.stack([timesteps / 10 - 1, angles.cos(), angles.sin()], dim=-1)
        return self.layers(torch.cat([points, condition], dim=-1))


def train(scheduler: LocalConsistencyScheduler, steps: int) -> Denoiser:
    """Each step clones the network once a task, trains the clones a little and follows their mean (REPTILE)."""
    torch.manual_seed(0)
    accelerator, model, segments = Accelerator(cpu=True), Denoiser(), scheduler.config.num_segments
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=f"{segments} segments"):
        angles = 2 * torch.pi * torch.rand(TASKS_PER_STEP)
        targets = local_targets(angles)[:, -segments:]  # plain diffusion sees the end only

        def task_loss(clone: nn.Module, task: int, inner_step: int) -> torch.Tensor:
            chosen, noise = torch.randint(1, segments + 1, (ROWS,)), torch.randn(ROWS, 2)
            timesteps, clean = scheduler.sample_timesteps(chosen), targets[task, chosen - 1]
            noised = scheduler.add_noise(clean, noise, timesteps, chosen)
            output = clone(noised, timesteps, angles[task].expand(ROWS))
            error = (output - scheduler.get_target(clean, noise, timesteps, chosen)).square().sum(dim=-1)
            return (scheduler.get_loss_weight(timesteps, chosen) * error).mean()

        reptile_step(accelerator, model, optimizer, TASKS_PER_STEP, task_loss, inner_learning_rate=0.02)
        schedule.step()
    return model


@torch.no_grad()
def sample(model: Denoiser, scheduler: LocalConsistencyScheduler, angles: torch.Tensor) -> torch.Tensor:
    """DDPM's mean steps from noise, a chain a task: `(T + 1, tasks, 2)`."""
    chain = [torch.randn(len(angles), 2, generator=torch.Generator().manual_seed(0))]
    for t in scheduler.timesteps:
        output = model(chain[-1], t.expand(len(angles)), angles)
        no_noise = torch.zeros_like(output)
        chain.append(scheduler.step(output, t, chain[-1], eta=1.0, variance_noise=no_noise).prev_sample)
    return torch.stack(chain)


def draw(chains: dict[str, torch.Tensor], angles: torch.Tensor, stops: torch.Tensor, output: str) -> None:
    """Left the local chains of the first task, then a panel for each name with the sampled chains of all tasks."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    first, *others = panels = figure.subplots(1, 1 + len(chains), sharex=True, sharey=True)
    first.set_title("what it learns: local chains of a task")
    scheduler, noise = LocalConsistencyScheduler(num_segments=NUM_TARGETS), torch.tensor([-0.9, 1.2])
    for index, (start, target) in enumerate(zip(scheduler.segment_boundaries, local_targets(angles[:1])[0])):
        times = torch.arange(start, len(scheduler))
        rows, segments = target.expand(len(times), 2), torch.full_like(times, index + 1)
        noised = scheduler.add_noise(rows, noise.expand_as(rows), times, segments)
        first.plot(*torch.cat([target[None], noised]).T, ".--", color=BLUE, lw=1, ms=4, label="noised local target")
        first.annotate(rf"$\theta_{index + 1}$", target.tolist(), xytext=(6, -12), textcoords="offset points")
    first.annotate("noise", noise.tolist(), xytext=(-4, 8), textcoords="offset points")
    for panel, (name, chain) in zip(others, chains.items()):
        panel.set_title(f"what it samples for unseen tasks: {name}")
        for line in chain.unbind(dim=1):
            panel.plot(*line.T, ".-", color=BLUE, lw=1, ms=4, label="sampled chain")
            panel.plot(*line[stops].T, "D", mfc="none", mec="black", ms=9, label="where it leaves a segment")
    for panel in panels:
        for angle in angles[: 1 if panel is first else None].unsqueeze(1):
            panel.plot(*optimiser_path(angle)[0].T, color="0.8", lw=4, zorder=0, label="optimiser's path, from +")
            panel.plot(*local_targets(angle)[0].T, "o", color=ORANGE, ms=6, label="local target")
        panel.plot(0, 0, "k+", ms=10)
        panel.set(aspect="equal", xlim=(-1.9, 2.1), ylim=(-2.1, 1.7))
    lines = {line.get_label(): line for panel in panels for line in panel.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    figure.savefig(output, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="toy_2d.png", help="where to save the picture (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="outer steps of REPTILE (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    angles = 2 * torch.pi * torch.arange(400) / 400  # drawn tasks are almost surely none of these
    shown = torch.tensor([20, 153, 287])
    chains = {}
    print("mean distance of the chain to  target 1  target 2  target 3")
    for name, segments in {"Mc-Di": NUM_TARGETS, "plain diffusion": 1}.items():
        scheduler = LocalConsistencyScheduler(num_segments=segments, loss_weighting="unit")
        chain = sample(train(scheduler, args.steps), scheduler, angles)
        stops = len(scheduler) - LocalConsistencyScheduler(num_segments=NUM_TARGETS).segment_boundaries
        distances = (chain[stops].transpose(0, 1) - local_targets(angles)).norm(dim=-1).mean(dim=0)
        print(f"{name:<31}" + "".join(f"{distance:8.2f}  " for distance in distances))
        chains[name] = chain[:, shown]
    draw(chains, angles[shown], stops, args.output)


if __name__ == "__main__":
    main()
