"""The benchmark in three pictures: accuracy against time, against shots, and along the sampler's chain."""

import matplotlib
from intervals import LEVEL, Estimate, bootstrap_interval, mean_estimate, paired_difference
from methods import MAIN


matplotlib.use("Agg")  # no window
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


# Colours that the colour-blind can tell apart (Okabe and Ito): one for all that starts alike.
BLUE, GREEN, VERMILION, ORANGE, PURPLE, GREY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#777777"
LOOKS = {
    "frozen + closed-form head": (GREY, "o"),
    "frozen, mean-pooled + logistic regression": (GREY, "P"),
    "learnt metric on frozen features": (ORANGE, "v"),
    "shared adapter": (GREEN, "s"),
    "equal shared adapter": (GREEN, "D"),
    "mean training adapter": (GREEN, "o"),
    "nearest training adapter": (GREEN, "^"),
    "mix of training adapters (LoraHub)": (GREEN, "P"),
    "gradient LoRA": (VERMILION, "s"),
    "gradient LoRA, REPTILE start": (VERMILION, "^"),
    "gradient LoRA, shared start": (VERMILION, "D"),
    "gradient LoRA, equal time": (VERMILION, "o"),
    "gradient LoRA, shared start, equal time": (VERMILION, "P"),
    "SetFit": (PURPLE, "p"),
    "hypernetwork": (BLUE, "o"),
    "Mc-Di, chosen": (BLUE, "X"),
    MAIN.name: (BLUE, "*"),
}
OBJECTIVE_LOOKS = {"Mc-Di": (BLUE, "-"), "Mv-Di": (VERMILION, "--"), "Tw-Di": (ORANGE, ":")}
OBJECTIVE_LOOKS["single level (OCD)"] = (PURPLE, "-.")


def time_picture(results: dict) -> Figure:
    """A point for each method: its paired difference from Mc-Di, the mean over data sets, against the time to an adapter.

    Mean accuracies would not do: slow methods saw the first of the tasks only, which may have been the easier ones.
    """
    figure, place = plt.subplots(figsize=(10, 6), layout="constrained")
    accuracy, kinds = results["accuracy"], results["kinds"]
    for name, (colour, shape) in LOOKS.items():
        own = accuracy.get(name, {})
        if name not in results["seconds"] or any(kind not in own for kind in kinds):
            continue
        found = mean_estimate([paired_difference(own[kind], accuracy[MAIN.name][kind]) for kind in kinds])
        looks = {"color": colour, "marker": shape, "markersize": 14 if name == MAIN.name else 8}
        seconds, half = results["seconds"][name], 100 * found.half_width
        place.errorbar(seconds, 100 * found.mean, half, ls="", elinewidth=1, label=name, **looks)
    place.axhline(0, color=BLUE, lw=0.8)
    place.set_xscale("log")
    place.set_xlabel("seconds from five examples a class to an adapter (log axis)")
    place.set_ylabel(f"points above {MAIN.name}, mean of {len(kinds)} data sets\n(bars: {100 * LEVEL:g} % interval)")
    place.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def shots_picture(*experiments: dict) -> Figure:
    """Accuracy against shots: the mean of all data sets, and of those that were measured at the most shots."""
    by_shots: dict[int, dict[str, tuple[dict, str]]] = {}
    for results in experiments:
        for kind in results["kinds"]:
            group, shots = kind.rpartition("x")[::2]
            by_shots.setdefault(int(shots), {})[group] = results, kind
    every = set.union(*(set(groups) for shots, groups in by_shots.items() if shots == min(by_shots)))
    few = set.intersection(*map(set, by_shots.values()))
    panels = {f"mean of {len(own)} data sets": own for own in (every, few)}
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False)
    names = [name for name in LOOKS if all(name in results["accuracy"] for results in experiments)]
    for place, (title, groups) in zip(axes[0], panels.items()):
        for name in names:
            points = {
                shots: _mean(name, [own[group] for group in sorted(groups)])
                for shots, own in sorted(by_shots.items())
                if groups <= set(own) and all(kind in one["accuracy"][name] for one, kind in map(own.get, groups))
            }
            _line(place, points, name, LOOKS[name])
        place.set_title(title)
        place.set_xscale("log", base=2)
        ticks = [shots for shots, own in sorted(by_shots.items()) if groups <= set(own)]
        place.set_xticks(ticks, map(str, ticks))
        place.set_xlabel("examples of a class (log axis)")
        place.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def chain_picture(results: dict) -> Figure:
    """Accuracy of single draws along the sampler's chain, beside what does without it on the same episodes."""
    figure, place = plt.subplots(figsize=(8, 5), layout="constrained")
    last, seen = 0, {}
    for objective, steps in results["chain"].items():
        points = {}
        for step, kinds in steps.items():
            points[int(step)] = mean_estimate([bootstrap_interval(kinds[kind]) for kind in results["kinds"]])
        _line(place, points, objective, (OBJECTIVE_LOOKS[objective][0], "o"), OBJECTIVE_LOOKS[objective][1])
        last = max(last, *points)
        if objective == MAIN.name:
            seen = next(iter(steps.values()))
    for name, colour in {"shared adapter": GREEN, "hypernetwork": GREY}.items():
        own, found = results["accuracy"].get(name, {}), []
        for kind in seen if own else []:
            same = {group: own[kind][group][: len(values)] for group, values in seen[kind].items()}
            found.append(bootstrap_interval(same))
        if found:
            place.hlines(100 * mean_estimate(found).mean, 0, last, color=colour, ls=(0, (5, 5)), label=name)
    place.set_xticks(sorted(points))
    place.set_xlabel("steps of the sampler taken, from noise")
    place.set_ylabel(f"accuracy of one draw, %\nmean of {len(results['kinds'])} data sets")
    place.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _mean(name: str, places: list[tuple[dict, str]]) -> Estimate:
    return mean_estimate([bootstrap_interval(results["accuracy"][name][kind]) for results, kind in places])


def _line(place: Axes, points: dict[int, Estimate], name: str, looks: tuple[str, str], style: str = "-") -> None:
    means = [100 * one.mean for one in points.values()]
    size = 12 if name == MAIN.name else 6
    place.plot(list(points), means, style, color=looks[0], marker=looks[1], markersize=size, label=name)
