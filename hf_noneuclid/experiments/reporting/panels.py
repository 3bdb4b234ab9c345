"""What the figures share: how methods look, panels of a setting, marks and legends."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import matplotlib.lines
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from hf_noneuclid.experiments.common import BLUE, STYLE, VERMILION, write_whole
from hf_noneuclid.experiments.reporting.curves import Curve, Point, by_setting

# Okabe and Ito's colours; the markers tell the methods apart in grey.
LOOKS = {
    "muon": (BLUE, "o"),
    "muonmax": (VERMILION, "s"),
    "scion": ("#009E73", "^"),
    "polargrad": ("#CC79A7", "D"),
    "adamw_torch": ("#000000", "v"),
    "adamw_torch_fused": ("#000000", "v"),
}
OTHER_LOOKS = (("#E69F00", "P"), ("#56B4E9", "X"), ("#7F7F7F", "*"), ("#F0E442", "h"))
SHOWN_ABOVE_BEST = 0.6  # of the best loss: what is higher is marked at the top edge
COLUMNS = 3
ROW = 5  # points between the rows of marks over the top edge
TITLE_WIDTH = 28  # characters
LOSS_LABEL, RATE_LABEL = "final validation loss (nats)", "learning rate"


def save(path: Path, figure: Figure) -> None:
    """Write a PNG whole or not at all, the same bytes for the same figure."""
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=200, metadata={"Software": None}))


def looks(curves: Iterable[Curve]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each family of methods, the same in every figure of a report."""
    others = sorted({curve.family for curve in curves} - set(LOOKS))
    return LOOKS | {name: OTHER_LOOKS[i % len(OTHER_LOOKS)] for i, name in enumerate(others)}


def style(curve: Curve, palette: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return how a method's line looks: solid with Momo; dashed, hollow and on top without."""
    colour, marker = palette[curve.family]
    common = {"color": colour, "marker": marker, "lw": 1.2}
    if curve.momo:
        return {**common, "ls": "-", "zorder": 2}
    return {**common, "ls": "--", "markerfacecolor": "white", "zorder": 2.5}


def draw(
    folder: Path, figures: dict[str, Callable[[Sequence[Curve]], Figure | None]], curves: Sequence[Curve]
) -> list[str]:
    """Write each figure that is not None; return the names of the files."""
    names = []
    with matplotlib.rc_context(STYLE):
        for name, make in figures.items():
            if (figure := make(curves)) is not None:
                save(folder / name, figure)
                names.append(name)
    return names


# ------------------------------------------------------------------------------------------- panels


def split(curves: Iterable[Curve], by: Callable[[Curve], str]) -> list[tuple[str, list[Curve]]]:
    """Return title and curves of each panel: one for each setting and value of `by`, setting by setting."""
    found: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for setting, members in by_setting(curves).items():
        for curve in members:
            found[setting, by(curve)].append(curve)
    return [(title(what, setting), members) for (setting, what), members in found.items()]


def title(*lines: str) -> str:
    """Return the lines that are not empty, broken where they are too long for a panel."""
    return "\n".join(fill(line, TITLE_WIDTH, break_long_words=False) for line in lines if line)


def columns(parts: Sequence[tuple[str, list[Curve]]], by_method: bool) -> int:
    """Return how many panels stand side by side: those of a setting if they are methods, else a few."""
    settings = by_setting(curve for _, members in parts for curve in members)
    if by_method and len(settings) > 1:
        return -(-len(parts) // len(settings))
    return 2 if len(parts) == 4 else COLUMNS


def grid(count: int, columns: int, single: tuple[float, float] = (6.0, 3.6)) -> tuple[Figure, list[Axes]]:
    """Return a figure with that many panels that share the axis of x."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = single if count == 1 else (1.6 + 2.1 * columns, 0.4 + 1.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:  # some have only a hidden panel below
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, panels[:count]


def label_outer(figure: Figure, panels: Sequence[Axes], below: str, beside: str) -> None:
    """Label the axes once for all panels, and the losses once for neighbours with the same range."""
    for left, right in pairwise(panels):
        if not right.get_subplotspec().is_first_col() and left.get_ylim() == right.get_ylim():
            right.yaxis.set_tick_params(labelleft=False)
    if len(panels) == 1:
        panels[0].set_xlabel(below)
        panels[0].set_ylabel(beside)
    else:
        figure.supxlabel(below, fontsize=8)
        figure.supylabel(beside, fontsize=8)


def loss_range(curves: Iterable[Curve]) -> tuple[float, float]:
    """Return the range of the losses to show, of the curves of a setting."""
    points = [point for curve in curves for point in curve.points if is_finite(point)]
    losses = sorted(loss for point in points for loss in point.losses)
    lowest, highest = losses[0], losses[-1]
    most = losses[3 * (len(losses) - 1) // 4]  # near zero the best may be a tiny part of all others
    top = min(highest, max(most, lowest + SHOWN_ABOVE_BEST * abs(lowest)))
    margin = 0.05 * (top - lowest) or 0.1
    return lowest - margin, top + margin


def is_finite(point: Point) -> bool:
    """Whether the point has a mean that can be drawn."""
    return bool(point.done) and not point.diverged


def mark_above(axes: Axes, places: Sequence[float], row: int, **style: Any) -> None:
    """Put marks over the top edge of the axes, where no line runs."""
    up = ScaledTranslation(0, (3 + ROW * row) / 72, axes.figure.dpi_scale_trans)
    where = axes.get_xaxis_transform() + up
    for mark in axes.plot(places, [1.0] * len(places), transform=where, clip_on=False, **style):
        mark.set_in_layout(False)  # the title leaves them room


def handle(label: str, **look: Any) -> matplotlib.lines.Line2D:
    """Return an entry of a legend."""
    return matplotlib.lines.Line2D([], [], label=label, **{"ms": 4, "lw": 1.2, **look})


def by_family(curve: Curve) -> tuple[int, str, bool]:
    """Sort the methods of a legend: a method with Momo before it without."""
    known = list(LOOKS).index(curve.family) if curve.family in LOOKS else len(LOOKS)
    return known, curve.family, not curve.momo
