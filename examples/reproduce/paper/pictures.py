"""Two pictures: an optimiser's path beside what is sampled, on the loss surface of a task, and accuracy against time."""

from pathlib import Path

import matplotlib
import torch

from mcdi_hf import LocalConsistencyScheduler

from .generator import Setting, sample, scheduler_of
from .heads import STEPS, loss_and_gradient, optimise, unseen
from .runs import features_at, load
from .summary import LEVELS, NAMES


matplotlib.use("Agg")  # no window
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.contour import ContourSet  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


COLOURS = {"mc": "#0072B2", "mv": "#D55E00", "tw": "#E69F00", "mv_times": "#777777"}
GRID, LEAST, LEVELS_OF_LOSS = 60, 1e-6, [i / 2 for i in range(-12, 4)]


def surface_picture(output_dir: Path, task: int = 0) -> Figure:
    """An optimiser's path beside the chains of Mc-Di and Mv-Di from the same start, without fresh noise: left of generators
    whose noise is any, right of those whose noise is a trajectory's own start."""
    features, usual = features_at(output_dir / "features.safetensors"), Setting()
    path = optimise(features.validation, task + 1, usual.learning_rate, usual.sam_rho, STEPS, seed=3)
    classes, start = path.classes[task:], path.start[task:]
    walked = torch.cat([start, path.targets[task]])
    rows, labels = unseen(features.validation, classes)
    figure, places = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for place, coupled in zip(places, (False, True)):
        chains = {}
        for one in ("mc", "mv"):
            setting = Setting(one, coupled=coupled)
            shown = features.validation[classes, 0, 0], None, 0.0
            chain = sample(load(setting, output_dir), scheduler_of(setting), *shown, start=start)
            chains[one] = chain[:, 0]
        drawn = _draw(place, walked, chains, rows, labels)
        place.set_title("noise is the trajectory's start" if coupled else "noise of its own")
    figure.colorbar(drawn, ax=places, label="log10 of the loss on unseen drawers")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(
    place: Axes, walked: torch.Tensor, chains: dict[str, torch.Tensor], rows: torch.Tensor, labels: torch.Tensor
) -> ContourSet:
    """The plane of the first two principal axes of all lines, through the path's end, and the loss in it."""
    points = torch.cat([walked, *chains.values()]).flatten(1)
    end = walked[-1].flatten()
    axes = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)[2][:2]
    path, *lines = ((line.flatten(1) - end) @ axes.T for line in (walked, *chains.values()))
    low, high = torch.cat([path, *lines]).aminmax(dim=0)
    margin = 0.15 * (high - low).max()
    first, second = (torch.linspace(low[i] - margin, high[i] + margin, GRID) for i in (0, 1))
    heads = (end + torch.cartesian_prod(first, second) @ axes).unflatten(1, walked.shape[1:])
    losses = loss_and_gradient(heads, rows.expand(len(heads), -1, -1), labels)[0].clamp(min=LEAST).view(GRID, GRID)
    drawn = place.contourf(
        first, second, losses.T.log10(), levels=LEVELS_OF_LOSS, cmap="Greys", alpha=0.7, extend="both"
    )
    kept = [round(i * STEPS / 3) for i in (1, 2, 3)]
    place.plot(*path.T, "-", color="black", lw=2, label="optimiser's path")
    place.plot(*path[kept].T, "o", color="black", ms=9, label="local targets 1, 2, 3")
    place.plot(*path[0], "k+", ms=14, mew=2, label="Gaussian start of all three")
    scheduler = LocalConsistencyScheduler()
    stops = len(scheduler) - scheduler.segment_boundaries
    for one, line in zip(chains, lines):
        place.plot(*line.T, ".-", color=COLOURS[one], lw=1.5, label=f"{NAMES[one]}, mean steps")
        place.plot(*line[stops].T, "D", mfc="none", mec=COLOURS[one], ms=9)
    place.plot([], [], "D", mfc="none", mec="black", label="where a chain leaves a segment")
    for number, at in enumerate(kept, start=1):
        place.annotate(str(number), path[at].tolist(), xytext=(7, 7), textcoords="offset points")
    place.set(xlabel="first principal axis", ylabel="second principal axis")
    return drawn


def time_picture(results: dict) -> Figure:
    """Accuracy on validation tasks against the time of training, by level."""
    figure, places = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharey=True)
    titles = {"bi": "two levels (REPTILE)", "single": "one level"}
    for place, level in zip(places, LEVELS):
        for one, name in NAMES.items():
            points = results["order"][level]["curve"][one]
            seconds, values = [point["seconds"] for point in points], [point["accuracy"] for point in points]
            middle = [sum(some) / len(some) for some in values]
            spread = [
                [m - min(some) for m, some in zip(middle, values)],
                [max(some) - m for m, some in zip(middle, values)],
            ]
            place.errorbar(seconds, middle, spread, color=COLOURS[one], marker="o", ms=4, capsize=2, label=name)
        place.set(title=titles[level], xlabel="seconds of training on one CPU core")
        place.grid(alpha=0.25)
    places[0].set_ylabel("accuracy on validation tasks, %\n(bars: all training seeds)")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
