"""The pictures of `benchmark_generation.py`: accuracy against time to adapter, and against steps."""

from pathlib import Path

from generation_report import interval
from generation_ways import CHOSEN, FREE, GRADIENT, SETFIT, STEPS, generated_name, median_seconds
from picture_style import ACCURACY, BLUE, GREEN, GREY, PURPLE, VERMILION, Axes, plt, save, seconds_axis, shared_legend


LOOKS = {
    GRADIENT: (VERMILION, "s"),
    SETFIT: (PURPLE, "D"),
    FREE: (GREY, "o"),
    **{f"generated, {name}": (GREEN, shape) for name, shape in zip(CHOSEN, ("^", "v", "P"))},
}


def title_of(family: str, kind: str) -> str:
    ways, shots = kind.split("x")
    return f"{family.capitalize()}, {ways}-way {shots}-shot"


def _panels(results: dict) -> list[tuple[str, dict[str, dict]]]:
    return [
        (title_of(family["name"], kind), {row["way"]: row for row in rows})
        for family in results["families"]
        for kind, rows in family["rows"].items()
    ]


def _percent(row: dict) -> tuple[float, float]:
    mean, half = interval(row["accuracy"])
    return 100 * mean, 100 * half


def draw_times(axes: Axes, rows: dict[str, dict]) -> None:
    """A point for each way; those of the pipeline at several numbers of steps are joined."""
    names = [generated_name(steps) for steps in STEPS]
    times, means = [median_seconds(rows[name]) for name in names], [_percent(rows[name])[0] for name in names]
    axes.plot(times, means, "o-", color=BLUE, label="generated, by number of steps", zorder=3)
    for place, (steps, x, y) in enumerate(zip(STEPS, times, means)):
        offset = 0, -14 if place % 2 else 6  # in turn below and above: neighbours may be close
        axes.annotate(str(steps), (x, y), offset, textcoords="offset points", ha="center", color=BLUE, fontsize=8)
    for name, (colour, shape) in LOOKS.items():
        if name in rows:
            mean, half = _percent(rows[name])
            axes.errorbar(
                median_seconds(rows[name]), mean, half, color=colour, marker=shape, ls="", elinewidth=0.8, label=name
            )
    seconds_axis(axes, "time from examples to adapter (log axis)")


def draw_steps(axes: Axes, rows: dict[str, dict]) -> None:
    """The pipeline's accuracy by steps, between what is free and gradient LoRA."""
    places, points = range(len(STEPS)), [_percent(rows[generated_name(steps)]) for steps in reversed(STEPS)]
    means, halves = zip(*points)
    axes.errorbar(places, means, halves, color=BLUE, marker="o", elinewidth=0.8, capsize=3, label="generated")
    for name, style in ((GRADIENT, "--"), (FREE, ":")):
        axes.axhline(_percent(rows[name])[0], color=LOOKS[name][0], ls=style, label=name)
    axes.set_xticks(places, [str(steps) for steps in reversed(STEPS)])
    axes.set_xlabel("steps of the sampler")


def save_pictures(results: dict, folder: Path) -> None:
    """Write `generation_time.png` and `generation_steps.png`, a panel for each row of tasks."""
    panels = _panels(results)
    for name, draw in (("generation_time", draw_times), ("generation_steps", draw_steps)):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4 + 3.4 * len(panels), 3.8), layout="constrained", squeeze=False, sharex=True
        )
        for place, (title, rows) in zip(axes[0], panels):
            draw(place, rows)
            place.set_title(title)
            place.grid(alpha=0.25)
        axes[0, 0].set_ylabel(ACCURACY)
        shared_legend(figure, axes[0])
        save(figure, folder / f"{name}.png")
