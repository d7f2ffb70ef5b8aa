"""The benchmark in one picture: how far methods are above or below Mc-Di, against the time to an adapter."""

import textwrap

import matplotlib
from intervals import LEVEL, paired_difference
from methods import MAIN


matplotlib.use("Agg")  # no window
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


COLUMNS = 4
# Colours that the colour-blind can tell apart (Okabe and Ito): one for all that starts alike.
BLUE, GREEN, VERMILION, ORANGE, PURPLE, GREY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#777777"
LOOKS = {
    "frozen + closed-form head": (GREY, "o"),
    "frozen + logistic regression": (GREY, "X"),
    "frozen, mean-pooled + logistic regression": (GREY, "P"),
    "shared adapter": (GREEN, "s"),
    "equal shared adapter": (GREEN, "D"),
    "nearest training adapter": (GREEN, "^"),
    "mix of training adapters (LoraHub)": (GREEN, "P"),
    "gradient LoRA, equal shots": (VERMILION, "s"),
    "gradient LoRA, equal time": (VERMILION, "D"),
    "SetFit": (PURPLE, "p"),
    "hypernetwork": (BLUE, "o"),
    "Mc-Di, one draw": (BLUE, "d"),
    MAIN.name: (BLUE, "*"),
}


def time_picture(experiments: list[dict]) -> Figure:
    """A panel for each experiment, a point for each method: its paired difference from Mc-Di, as in the tables.

    Mean accuracies would not do: slow methods saw the first of the tasks only, which may have been the easier ones. A
    method that saw a single one has no interval, and no point.
    """
    columns = min(COLUMNS, len(experiments))
    rows = -(-len(experiments) // columns)
    size = {"figsize": (max(8, 4 * columns), 3.5 * rows + 1.5), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharex=True, **size)
    for place in axes.flat[len(experiments) :]:
        place.remove()
    handles = {}
    for place, results in zip(axes.flat, experiments):
        kind, accuracy = results["time_kind"], results["accuracy"]
        for name in LOOKS:
            if name not in results["seconds"] or kind not in accuracy.get(name, {}):
                continue
            found, (colour, shape) = paired_difference(accuracy[name][kind], accuracy[MAIN.name][kind]), LOOKS[name]
            if found.count > 1:
                mean, bars = 100 * found.mean, [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
                looks = {"color": colour, "marker": shape, "markersize": 13 if name == MAIN.name else 7}
                handles[name] = place.errorbar(results["seconds"][name], mean, bars, ls="", elinewidth=1, **looks)
        place.axhline(0, color=BLUE, lw=0.8)
        place.set_title(textwrap.fill(f"{results['title']}, {kind}", 44), fontsize=10)
        place.set_xscale("log")
        place.set_xlabel("seconds to an adapter (log axis)")
        place.grid(alpha=0.25)
        place.tick_params(labelbottom=True)
    figure.supylabel(f"points above {MAIN.name} on the same tasks\n(bars: {100 * LEVEL:g} % interval)")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    return figure
