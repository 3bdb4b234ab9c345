"""What the figures share: colours and markers of the methods, panels, marks and legends."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from hf_noneuclid.experiments.common import BLUE, VERMILION
from hf_noneuclid.experiments.reporting.curves import Curve, by_setting

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
ROW = 5  # points between the rows of marks above the top edge
TITLE_WIDTH = 28  # characters

Look = Callable[[Curve], dict[str, Any]]
"""How the line of a curve looks, as arguments of ``Axes.plot``."""


def method_look(curves: Iterable[Curve]) -> Look:
    """A colour and a marker for each family of methods, the same in every figure of a report.

    Lines are solid with Momo. Without, they are dashed and hollow, and on top.
    """
    others = sorted({curve.family for curve in curves} - set(LOOKS))
    palette = LOOKS | {name: OTHER_LOOKS[i % len(OTHER_LOOKS)] for i, name in enumerate(others)}

    def look(curve: Curve) -> dict[str, Any]:
        colour, marker = palette[curve.family]
        momo = {"ls": "-", "zorder": 2} if curve.momo else {}
        plain = {"ls": "--", "markerfacecolor": "white", "zorder": 2.5}
        return {"color": colour, "marker": marker, "lw": 1.2, **(momo or plain)}

    return look


def by_family(curve: Curve) -> tuple[int, str, bool]:
    """Sorts the methods of a legend, each method with Momo before the one without."""
    known = list(LOOKS).index(curve.family) if curve.family in LOOKS else len(LOOKS)
    return known, curve.family, not curve.momo


def handle(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **{"ms": 4, "lw": 1.2, **look})


def split(curves: Iterable[Curve], by: Callable[[Curve], str]) -> list[tuple[str, list[Curve]]]:
    """Title and curves of each panel, one for each setting and value of ``by``."""
    found: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for setting, members in by_setting(curves).items():
        for curve in members:
            found[setting, by(curve)].append(curve)
    return [(title(what, setting), members) for (setting, what), members in found.items()]


def title(*lines: str) -> str:
    """The lines that are not empty, broken where they are too long for a panel."""
    return "\n".join(fill(line, TITLE_WIDTH, break_long_words=False) for line in lines if line)


def grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, which share the x axis."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (6.0, 3.6) if count == 1 else (1.6 + 2.1 * columns, 0.4 + 1.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:  # some have only a hidden panel below
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, panels[:count]


def label_outer(figure: Figure, panels: Sequence[Axes], below: str, beside: str) -> None:
    """Labels the axes once for all panels, and the losses once for neighbours with the same range."""
    for left, right in pairwise(panels):
        place = right.get_subplotspec()
        if place is not None and not place.is_first_col() and left.get_ylim() == right.get_ylim():
            right.yaxis.set_tick_params(labelleft=False)
    if len(panels) == 1:
        panels[0].set_xlabel(below)
        panels[0].set_ylabel(beside)
    else:
        figure.supxlabel(below, fontsize=8)
        figure.supylabel(beside, fontsize=8)


def loss_range(curves: Iterable[Curve]) -> tuple[float, float]:
    """The range of losses to show for the curves of a setting."""
    points = [point for curve in curves for point in curve.points if point.is_finite]
    losses = sorted(loss for point in points for loss in point.losses)
    lowest, highest = losses[0], losses[-1]
    most = losses[3 * (len(losses) - 1) // 4]  # near zero, all others may be far above the best
    top = min(highest, max(most, lowest + SHOWN_ABOVE_BEST * abs(lowest)))
    margin = 0.05 * (top - lowest) or 0.1
    return lowest - margin, top + margin


def mark_above(axes: Axes, places: Sequence[float], row: int, **look: Any) -> None:
    """Puts marks above the top edge of the axes, where there are no lines."""
    up = ScaledTranslation(0, (3 + ROW * row) / 72, axes.figure.dpi_scale_trans)
    where = axes.get_xaxis_transform() + up
    for mark in axes.plot(places, [1.0] * len(places), transform=where, clip_on=False, **look):
        mark.set_in_layout(False)  # the title leaves room for them
