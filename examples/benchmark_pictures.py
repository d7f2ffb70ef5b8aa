"""The pictures of `benchmark.py`: accuracy against time, steps and shots, and the chain of the sampler."""

import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
from benchmark_ways import (
    CEILING,
    FROZEN,
    GRADIENT,
    GRADIENT_TIME,
    LOGISTIC,
    MC_DI,
    MEAN,
    MIXED,
    NEAREST,
    ONE_DRAW,
    REPTILE,
    RIVALS,
    SETFIT,
    SHARED,
)
from generation_report import interval
from matplotlib.contour import ContourSet
from picture_style import (
    ACCURACY,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    Axes,
    plt,
    save,
    seconds_axis,
    shared_legend,
)


# A colour says what a way starts from, a shape which of them it is.
LOOKS = {
    FROZEN: (GREY, "o"),
    LOGISTIC: (GREY, "X"),
    SHARED: (GREEN, "s"),
    MEAN: (GREEN, "D"),
    NEAREST: (GREEN, "^"),
    MIXED: (GREEN, "P"),
    REPTILE: (ORANGE, "v"),
    GRADIENT: (VERMILION, "s"),
    GRADIENT_TIME: (VERMILION, "D"),
    SETFIT: (PURPLE, "p"),
    ONE_DRAW: (BLUE, "d"),
    MC_DI: (BLUE, "*"),
}
MAIN = [FROZEN, LOGISTIC, SHARED, GRADIENT, NEAREST, MC_DI]
COLUMNS = 3


def pooled(groups: dict[str, list[float]]) -> tuple[float, float]:
    """The mean accuracy over the episodes of all folds and seeds, and half its 95 % interval, in percent."""
    mean, half = interval(np.concatenate(list(groups.values())).tolist())
    return 100 * mean, 100 * half


def split_kind(kind: str) -> tuple[str, int]:
    """`"sentiment:2x5"` -> `("sentiment: 2-way", 5)`: what tasks are of, and their shots."""
    group, _, size = kind.rpartition(":")
    ways, shots = size.split("x")
    return f"{group}: {ways}-way" if group else f"{ways}-way", int(shots)


def kind_text(kind: str) -> str:
    name, shots = split_kind(kind)
    return f"{name} {shots}-shot"


def marker_of(way: str) -> dict:
    """The looks of a way's points; ours are larger, and lie on top."""
    colour, shape = LOOKS[way]
    own = {"markersize": 13, "markeredgecolor": BLACK, "elinewidth": 1.8, "zorder": 5} if way == MC_DI else {}
    return {"color": colour, "marker": shape, "markersize": 7, "elinewidth": 0.9, "label": way} | own


def panels_for(title: str, count: int, sharex: bool = False) -> tuple[plt.Figure, list[Axes]]:
    """A figure of some panels, at most `COLUMNS` beside each other, each as large as any other."""
    columns = min(count, 2 if count == 4 else COLUMNS)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.2 + 3.6 * columns, max(0.3 + 3.3 * rows, 4.9)),
        layout="constrained",
        squeeze=False,
        sharex=sharex,
    )
    figure.suptitle(title, weight="bold")
    for place in axes.flat[count:]:
        place.remove()
    for place in axes.flat[:count]:
        place.grid(alpha=0.25)
    for place in axes[:, 0]:
        place.set_ylabel(ACCURACY)
    return figure, list(axes.flat[:count])


def panel_title(axes: Axes, title: str, kind: str) -> None:
    axes.set_title(f"{textwrap.fill(title, 46)}\n{kind}", fontsize=10)


def draw_times(axes: Axes, table: dict) -> None:
    """A point for each way that makes one adapter from the shots; a line for what all data gives.

    Ablations are left out: they take the generator's time, and may have been trained, and so tested, for fewer seeds.
    """
    kind = table["time_kind"]
    for way in [*RIVALS, ONE_DRAW, MC_DI]:
        if way in table["seconds"] and kind in table["accuracy"].get(way, {}):
            mean, half = pooled(table["accuracy"][way][kind])
            axes.errorbar(table["seconds"][way], mean, half, ls="", **marker_of(way))
    if kind in table["accuracy"].get(CEILING, {}):
        axes.axhline(pooled(table["accuracy"][CEILING][kind])[0], color=BLACK, ls=":", lw=1.2, label=CEILING)
    panel_title(axes, table["title"], kind_text(kind))
    axes.tick_params(labelbottom=True)  # though the axis is shared
    seconds_axis(axes, "time from examples to adapter (log axis)")


def shot_series(table: dict) -> dict[str, dict[str, dict[int, tuple[float, float]]]]:
    """Kinds that differ in their shots only: what they are of -> way -> shots -> mean and half interval, in percent."""
    shots = defaultdict(dict)
    for kind in table["kinds"]:
        name, count = split_kind(kind)
        shots[name][count] = kind
    return {
        name: {
            way: {
                count: pooled(table["accuracy"][way][kind])
                for count, kind in sorted(kinds.items())
                if kind in table["accuracy"].get(way, {})
            }
            for way in MAIN
        }
        for name, kinds in shots.items()
        if len(kinds) > 1
    }


def draw_shots(axes: Axes, series: dict[str, dict[int, tuple[float, float]]]) -> None:
    """A line for each way, from few shots to many."""
    counts = sorted({count for points in series.values() for count in points})
    for way, points in series.items():
        if points:
            means, halves = zip(*points.values())
            width = 2.2 if way == MC_DI else 1.2
            axes.errorbar(list(points), means, halves, ls="-", lw=width, capsize=2, **marker_of(way))
    _number_axis(axes, counts, "examples of a class (log axis)")


def draw_steps(axes: Axes, steps: dict, title: str) -> None:
    """The sampler and gradient descent from their first step on, above what takes none."""
    lines = {MC_DI: (steps["generated"], "steps of the sampler"), GRADIENT: (steps["gradient"], "steps of Adam")}
    for way, (found, unit) in lines.items():
        places = sorted(int(count) for count in found)
        means, halves = zip(*(pooled({"all": found[str(count)]}) for count in places))
        looks = marker_of(way) | {"label": f"{way}:\n{unit}"}
        axes.errorbar(places, means, halves, ls="-", capsize=3, **looks)
    mean, half = pooled({"all": steps["frozen"]})
    axes.axhline(mean, color=GREY, ls="--", label=f"{FROZEN}:\nno step")
    axes.axhspan(mean - half, mean + half, color=GREY, alpha=0.12, lw=0)
    panel_title(axes, title, f"validation tasks, {kind_text(steps['kind'])}")
    counts = sorted({int(count) for found, _ in lines.values() for count in found})
    _number_axis(axes, counts, "number of steps (log axis)")


def _number_axis(axes: Axes, counts: list[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


def draw_chain(axes: Axes, chain: dict) -> None:
    """The optimiser's path and the chains of the sampler above the loss, local targets and passages numbered."""
    path, targets, chains = (np.array(chain[name]) for name in ("trajectory", "targets", "chains"))
    losses, last = chain["losses"], f"target {len(targets)}"
    axes.plot(*path.T, ".-", color=VERMILION, lw=1.6, ms=4, label="optimiser on many examples")
    _numbered(axes, targets, VERMILION, "s", f"its local targets (loss at the last: {losses[last]:.3g})")
    axes.plot(*chains[0].T, color=BLUE, lw=1.0, label=f"sampler, {chain['shots']}-shot: {len(chains)} draws")
    for points in chains[1:]:
        axes.plot(*points.T, color=BLUE, lw=1.0)
    axes.plot(*chains[:, 0].T, "o", color="white", mec=BLUE, ms=6, label="the noise that they start from")
    looks = {"mec": BLACK, "ls": "", "zorder": 3}
    axes.plot(*chain["adapter"], "*", color=BLUE, ms=21, label=f"Mc-Di (loss: {losses['adapter']:.3g})", **looks)
    _numbered(axes, chains[:, chain["passages"]].mean(axis=0), BLUE, "o", "mean of the draws after each segment")
    label = f"free: mean adapter, imprinted head (loss: {losses['free']:.3g})"
    axes.plot(*chain["free"], "P", color=GREEN, ms=10, label=label, **looks)
    first, second = chain["variance_explained"]
    axes.set_xlabel(f"first principal direction of the optimiser's path ({100 * first:.0f} % of its variance)")
    axes.set_ylabel(f"second principal direction ({100 * second:.0f} %)")


def draw_losses(axes: Axes, grid: dict) -> ContourSet:
    """The grid of losses as areas of grey, the darker the worse."""
    losses = np.maximum(grid["loss"], 1e-4)  # a loss of nothing has no logarithm
    levels = np.geomspace(losses.min(), losses.max(), 13)
    greys = plt.get_cmap("Greys")(np.linspace(0, 0.5, len(levels) - 1))
    return axes.contourf(grid["x"], grid["y"], losses, levels=levels, colors=greys)


def chain_picture(chain: dict, title: str) -> plt.Figure:
    """The whole plane, and the chains closer: they may be short beside the optimiser's path."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), layout="constrained", width_ratios=[3, 2])
    figure.suptitle("The chain of the sampler beside the path of the optimiser, in the space of tokens", weight="bold")
    for axes in panels:
        surface = draw_losses(axes, chain["grid"])
        draw_chain(axes, chain)
    bar = figure.colorbar(surface, ax=panels[1], pad=0.02, ticks=surface.levels[::3], format="%.3g")
    bar.set_label("loss in this plane (cross-entropy on query examples)")
    points = np.concatenate([*chain["chains"], [chain["free"], chain["adapter"]]])
    low, high = points.min(axis=0), points.max(axis=0)
    low, high = low - 0.12 * (high - low), high + 0.12 * (high - low)
    panels[0].indicate_inset((*low, *(high - low)), edgecolor=BLACK, alpha=0.8)
    panel_title(panels[0], f"A validation task of {title}", f"{len(chain['classes'])} classes")
    panels[1].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), ylabel="", xlabel="first principal direction")
    share = f"{100 * chain['adapter_in_plane']:.2g} % of the squared distance"
    panel_title(panels[1], "The frame, closer", f"{share} from free to Mc-Di lie in this plane")
    shared_legend(figure, panels[:1], loc="outside lower center", ncols=3, labelspacing=0.6)
    return figure


def _numbered(axes: Axes, points: np.ndarray, colour: str, shape: str, label: str) -> None:
    axes.plot(*points.T, shape, color=colour, mec="white", ms=11, ls="", zorder=4, label=label)
    for number, point in enumerate(points, start=1):
        axes.annotate(
            str(number),
            point,
            color="white",
            ha="center",
            va="center",
            fontsize=8,
            weight="bold",
            zorder=4,
            annotation_clip=True,
        )


def save_pictures(results: dict, folder: Path) -> list[Path]:
    """Draw what a family's results hold: times and, where there are such, shots, steps and a chain.

    Args:
        results (`dict`): What `benchmark.py` writes as `docs/results/FAMILY.json`.
        folder (`Path`): Where `FAMILY_time.png`, `FAMILY_shots.png`, `FAMILY_steps.png` and `FAMILY_chain.png` go.

    Returns:
        The files written.
    """
    family, tables = results["family"], results["tables"]
    titles = {table["name"]: table["title"] for table in tables}
    figure, panels = panels_for("Accuracy against the time that an adapter takes", len(tables), sharex=True)
    for axes, table in zip(panels, tables):
        draw_times(axes, table)
    shared_legend(figure, panels)
    written = [save(figure, folder / f"{family}_time.png")]
    series = [(table["title"], name, own) for table in tables for name, own in shot_series(table).items()]
    if series:
        figure, panels = panels_for("Accuracy against the number of examples", len(series))
        for axes, (title, name, own) in zip(panels, series):
            draw_shots(axes, own)
            panel_title(axes, title, name)
        shared_legend(figure, panels)
        written.append(save(figure, folder / f"{family}_shots.png"))
    if steps := results.get("steps"):
        figure, (axes,) = panels_for("Accuracy against the number of steps", 1)
        draw_steps(axes, steps, titles[steps["table"]])
        shared_legend(figure, [axes])
        written.append(save(figure, folder / f"{family}_steps.png"))
    if chain := results.get("chain"):
        figure = chain_picture(chain, titles[chain["table"]])
        written.append(save(figure, folder / f"{family}_chain.png"))
    return written
