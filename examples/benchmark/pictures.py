"""The benchmark in one picture: accuracy against the time to an adapter."""

import textwrap

import matplotlib
from intervals import bootstrap_interval
from methods import MAIN, METHODS


matplotlib.use("Agg")  # no window
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


COLUMNS = 4
# Colours that the colour-blind can tell apart (Okabe and Ito): one for all that starts alike.
BLUE, GREEN, VERMILION, ORANGE, PURPLE, GREY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#777777"
LOOKS = {
    "frozen + imprinted head": (GREY, "o"),
    "frozen + logistic regression": (GREY, "X"),
    "one shared adapter": (GREEN, "s"),
    "mean of the training adapters": (GREEN, "D"),
    "nearest training adapter": (GREEN, "^"),
    "mix of training adapters (LoraHub)": (GREEN, "P"),
    "REPTILE start + gradient steps": (ORANGE, "v"),
    "gradient LoRA, equal shots": (VERMILION, "s"),
    "gradient LoRA, equal time": (VERMILION, "D"),
    "SetFit": (PURPLE, "p"),
    "Mc-Di, one draw": (BLUE, "d"),
    MAIN.name: (BLUE, "*"),
}


def time_picture(experiments: list[dict]) -> Figure:
    """A panel for each experiment, a point for each method, with the interval of the tables."""
    rows = -(-len(experiments) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(4 * COLUMNS, 3.4 * rows + 1), layout="constrained", squeeze=False, sharex=True
    )
    for place in axes.flat[len(experiments) :]:
        place.remove()
    handles = {}
    for place, results in zip(axes.flat, experiments):
        kind = results["time_kind"]
        for name in METHODS:
            if name in LOOKS and name in results["seconds"] and kind in results["accuracy"].get(name, {}):
                found, (colour, shape) = bootstrap_interval(results["accuracy"][name][kind]), LOOKS[name]
                mean = 100 * found.mean
                bars = [[mean - 100 * max(found.low, 0)], [100 * min(found.high, 1) - mean]]
                size = 13 if name == MAIN.name else 7
                handles[name] = place.errorbar(
                    results["seconds"][name],
                    mean,
                    bars,
                    ls="",
                    color=colour,
                    marker=shape,
                    markersize=size,
                    elinewidth=1,
                )
        place.set_title(textwrap.fill(f"{results['title']}, {kind}", 44), fontsize=10)
        place.set_xscale("log")
        place.grid(alpha=0.25)
        place.tick_params(labelbottom=True)
    figure.supxlabel("seconds from examples to adapter (log axis)")
    figure.supylabel("accuracy, % (bars: 95 % interval)")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
