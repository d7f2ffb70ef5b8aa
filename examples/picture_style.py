"""How all pictures look: colours, shapes, fonts, axes, and how they are saved."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")  # no window
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402
from PIL import Image  # noqa: E402


# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, GREEN, VERMILION, ORANGE, PURPLE = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7"
GREY, BLACK = "#777777", "#000000"
ACCURACY = "accuracy, % (bars: 95 % interval)"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})


def seconds_text(seconds: float, _: int) -> str:
    return f"{1000 * seconds:g} ms" if seconds < 1 else f"{seconds:g} s"


def seconds_axis(axes: Axes, label: str) -> None:
    """Make the horizontal axis one of times, of a millisecond and an hour alike."""

    def minor_text(seconds: float, place: int) -> str:
        low, high = axes.get_xlim()
        # Between two powers of ten there is no other label; these lie evenly enough on the axis.
        return seconds_text(seconds, place) if high < 10 * low and f"{seconds:.0e}"[0] in "2346" else ""

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(seconds_text))
    axes.xaxis.set_minor_formatter(FuncFormatter(minor_text))
    axes.set_xlabel(label)


def shared_legend(figure: Figure, panels: Iterable[Axes], **where) -> None:
    """One legend for all panels, an entry a label, in the order in which they come first."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    where = {"loc": "outside right center", "labelspacing": 0.8} | where
    figure.legend(handles.values(), handles.keys(), frameon=False, **where)


def with_palette(picture: Image.Image, size: int = 192) -> Image.Image:
    """The picture in `size` colours, which makes a small file: areas keep theirs, and smoothed edges take the nearest."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.int64) @ [256**2, 256, 1]
    colours, places, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    places = places.reshape(pixels.shape)
    within = (pixels[1:, 1:] == pixels[:-1, 1:]) & (pixels[1:, 1:] == pixels[1:, :-1])  # like those above and beside
    areas = np.bincount(places[1:, 1:][within], minlength=len(colours))
    parts = colours[:, None] // [256**2, 256, 1] % 256
    kept = parts[np.lexsort((-counts, -areas))[:size]]
    nearest = np.square(parts[:, None] - kept).sum(axis=2).argmin(axis=1).astype(np.uint8)
    small = Image.fromarray(nearest[places])
    small.putpalette(kept.astype(np.uint8).tobytes())
    return small


def save(figure: Figure, path: Path) -> Path:
    """Write a picture and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as drawn:
        small = with_palette(drawn)
    small.save(path, optimize=True)
    return path
