"""The figures every report has: final loss against learning rate, losses and step sizes over time."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_noneuclid.experiments.reporting.bounds import in_words
from hf_noneuclid.experiments.reporting.comparisons import is_variant
from hf_noneuclid.experiments.reporting.curves import Curve, Point, by_setting
from hf_noneuclid.experiments.reporting.lower_bounds import bound_of, order, with_lower_bound
from hf_noneuclid.experiments.reporting.panels import (
    LOSS_LABEL,
    RATE_LABEL,
    ROW,
    by_family,
    columns,
    draw,
    grid,
    handle,
    is_finite,
    label_outer,
    looks,
    loss_range,
    mark_above,
    split,
    style,
)
from hf_noneuclid.experiments.reporting.time_figures import step_size, training

Look = Callable[[Curve], dict[str, Any]]

# Okabe and Ito's, grey for their yellow; eight colours and nine markers make 72 pairs.
BOUND_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F")
BOUND_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
GREY = {"ls": "none", "color": "#555555"}
GREY_LINE = {"color": "#555555", "marker": ".", "lw": 1.0}  # of a method whose bound does not vary


def draw_basic(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """Write the figures for which there are runs; return the names of their files."""
    figures: dict[str, Callable[[Sequence[Curve]], Figure | None]] = {
        "final_loss.png": final_loss,
        "training.png": training,
        "step_size.png": step_size,
    }
    return draw(folder, figures, curves)


def final_loss(curves: Sequence[Curve]) -> Figure | None:
    """Draw final loss against learning rate, a panel for each setting and options of the methods.

    Where lower bounds are compared, a panel for each setting and method, and a line for each bound.
    """
    shown = [curve for curve in curves if curve.best and not is_variant(curve)]
    if not shown:
        return None
    bounded = with_lower_bound(shown)
    look, legend = _looks_of_bounds(bounded) if bounded else _looks_of_methods(shown, looks(curves))
    parts = split(shown, _method if bounded else _options)
    figure, panels = grid(len(parts), columns(parts, bool(bounded)))
    ranges = {name: loss_range(members) for name, members in by_setting(shown).items()}
    for axes, (name, members) in zip(panels, parts, strict=True):
        rows = _loss_panel(axes, members, look, ranges[members[0].setting])
        axes.set_title(name or " ", fontsize=8, pad=5 + ROW * rows)
    label_outer(figure, panels, RATE_LABEL, LOSS_LABEL)
    handles = [*legend, *_legend_of_marks(shown, ranges)]
    heading = "lower bound F*" if bounded else None
    figure.legend(handles=handles, loc="outside right upper", handlelength=3, title=heading)
    return figure


def _method(curve: Curve) -> str:
    return curve.method


def _options(curve: Curve) -> str:
    return ", ".join(in_words(curve.method_options))


def _looks_of_methods(
    curves: Sequence[Curve], palette: dict[str, tuple[str, str]]
) -> tuple[Look, list[Line2D]]:
    methods = {curve.method: curve for curve in curves}
    ordered = sorted(methods.values(), key=by_family)
    return (
        lambda curve: style(curve, palette),
        [handle(curve.method, **style(curve, palette)) for curve in ordered],
    )


def _looks_of_bounds(curves: Sequence[Curve]) -> tuple[Look, list[Line2D]]:
    """Return a colour and a marker for each bound, the same in every panel."""
    names = dict.fromkeys(bound_of(curve) for curve in sorted(curves, key=order))
    cycle = zip(names, itertools.cycle(BOUND_COLOURS), itertools.cycle(BOUND_MARKERS), strict=False)
    found = {name: {"color": colour, "marker": marker, "lw": 1.0} for name, colour, marker in cycle}

    def look(curve: Curve) -> dict[str, Any]:
        return found.get(bound_of(curve), GREY_LINE) | {"ls": "-" if curve.momo else "--"}

    return look, [handle(name, **line) for name, line in found.items()]


def _loss_panel(axes: Axes, curves: Sequence[Curve], look: Look, limits: tuple[float, float]) -> int:
    """Draw the curves of a panel; return the rows of marks over its top edge."""
    axes.set_xscale("log")
    axes.set_ylim(*limits)
    for curve in curves:
        _loss_line(axes, curve, look(curve))
    return _mark_what_is_not_shown(axes, curves, look, limits[1])


def _loss_line(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    for piece in pieces(curve.points):
        rates = [point.learning_rate for point in piece]
        axes.plot(rates, [point.loss for point in piece], ms=3.5, **look)
        low, high = ([pick(point.losses) for point in piece] for pick in (min, max))
        axes.fill_between(rates, low, high, color=look["color"], alpha=0.18, lw=0)


def _mark_what_is_not_shown(axes: Axes, curves: Sequence[Curve], look: Look, top: float) -> int:
    """Mark over the top edge, in a row for each curve, where it diverged or is too high; return the rows."""
    rows = 0
    for curve in curves:
        gone = [point.learning_rate for point in curve.points if point.diverged]
        over = [point.learning_rate for point in curve.points if is_finite(point) and point.loss > top]
        if gone or over:
            marks = {"color": look(curve)["color"], "ms": 3.5, "ls": "none"}
            mark_above(axes, gone, rows, marker="x", **marks)
            mark_above(axes, over, rows, marker="^", fillstyle="none", **marks)
            rows += 1
    return rows


def pieces(points: Iterable[Point]) -> list[list[Point]]:
    """Cut a curve where a learning rate has no finite loss: no line is drawn across."""
    parts: list[list[Point]] = [[]]
    for point in points:
        if is_finite(point):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _legend_of_marks(curves: Sequence[Curve], ranges: dict[str, tuple[float, float]]) -> list[Line2D]:
    handles = []
    points = [(point, ranges[curve.setting][1]) for curve in curves for point in curve.points]
    if any(point.diverged for point, _ in points):
        handles.append(handle("a seed diverged", marker="x", **GREY))
    if any(is_finite(point) and point.loss > top for point, top in points):
        handles.append(handle("above the figure", marker="^", fillstyle="none", **GREY))
    return handles
