"""The figures every report has: final loss against learning rate, losses and step sizes over time."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from reporting.comparisons import is_variant
from reporting.curves import Curve, Point, best_of_each, mean_series
from training.drawing import BLUE, STYLE, VERMILION, series
from training.files import write_whole

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
STEP_SIZE_RATES = 4
GREY = {"ls": "none", "color": "#555555"}
LOSS_LABEL, RATE_LABEL = "final validation loss (nats per token)", "learning rate"


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


def draw_basic(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """Write the figures for which there are runs; return the names of their files."""
    figures: dict[str, Callable[[Sequence[Curve]], Figure | None]] = {
        "final_loss.png": final_loss,
        "training.png": training,
        "step_size.png": step_size,
    }
    return draw(folder, figures, curves)


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


# -------------------------------------------------------------------------------------- final loss


def final_loss(curves: Sequence[Curve]) -> Figure | None:
    """Draw final loss against learning rate, a panel for each setting of the other options."""
    shown = [curve for curve in curves if curve.best and not is_variant(curve)]
    settings = list(dict.fromkeys(curve.setting for curve in shown))
    if not shown:
        return None
    figure, panels = grid(len(settings), single=(6.0, 3.6))
    palette = looks(curves)
    top = loss_limits(panels[0], shown)
    for axes, setting in zip(panels, settings, strict=True):
        members = [curve for curve in shown if curve.setting == setting]
        axes.set_xscale("log")
        for curve in members:
            _loss_line(axes, curve, style(curve, palette))
        rows = _mark_what_is_not_shown(axes, members, palette, top)
        axes.set_title(setting.replace(", ", "\n") or " ", fontsize=8, pad=5 + ROW * rows)
    label_outer(figure, panels, RATE_LABEL, LOSS_LABEL)
    _legend_of_methods(figure, shown, palette, top)
    return figure


def loss_limits(axes: Axes, curves: Iterable[Curve]) -> float:
    """Set the range of the losses (axes may share it) and return its top."""
    losses = [p.loss for curve in curves for p in curve.points if is_finite(p)]
    lowest, highest = min(losses), max(losses)
    top = min(highest, lowest + SHOWN_ABOVE_BEST * abs(lowest))
    margin = 0.05 * (top - lowest) or 0.1
    axes.set_ylim(lowest - margin, top + margin)
    return top + margin


def is_finite(point: Point) -> bool:
    """Whether the point has a mean that can be drawn."""
    return bool(point.done) and not point.diverged


def _loss_line(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    for piece in pieces(curve.points):
        rates = [point.learning_rate for point in piece]
        axes.plot(rates, [point.loss for point in piece], ms=3.5, **look)
        low, high = ([pick(point.losses) for point in piece] for pick in (min, max))
        axes.fill_between(rates, low, high, color=look["color"], alpha=0.18, lw=0)


def _mark_what_is_not_shown(
    axes: Axes, curves: Sequence[Curve], palette: dict[str, tuple[str, str]], top: float
) -> int:
    """Mark over the top edge, in a row for each method, where it diverged or is too high; return the rows."""
    rows = 0
    for curve in curves:
        gone = [point.learning_rate for point in curve.points if point.diverged]
        over = [point.learning_rate for point in curve.points if is_finite(point) and point.loss > top]
        if gone or over:
            marks = {"color": palette[curve.family][0], "ms": 3.5, "ls": "none"}
            mark_above(axes, gone, rows, marker="x", **marks)
            mark_above(axes, over, rows, marker="^", fillstyle="none", **marks)
            rows += 1
    return rows


def mark_above(axes: Axes, places: Sequence[float], row: int, **style: Any) -> None:
    """Put marks over the top edge of the axes, where no line runs."""
    up = ScaledTranslation(0, (3 + ROW * row) / 72, axes.figure.dpi_scale_trans)
    where = axes.get_xaxis_transform() + up
    for mark in axes.plot(places, [1.0] * len(places), transform=where, clip_on=False, **style):
        mark.set_in_layout(False)  # the title leaves them room


def pieces(points: Iterable[Point]) -> list[list[Point]]:
    """Cut a curve where a learning rate has no finite loss: no line is drawn across."""
    parts: list[list[Point]] = [[]]
    for point in points:
        if is_finite(point):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _legend_of_methods(
    figure: Figure, curves: Sequence[Curve], palette: dict[str, tuple[str, str]], top: float
) -> None:
    methods = {curve.method: curve for curve in curves}
    handles = [handle(c.method, **style(c, palette)) for c in sorted(methods.values(), key=_by_family)]
    points = [point for curve in curves for point in curve.points]
    if any(point.diverged for point in points):
        handles.append(handle("a seed diverged", marker="x", **GREY))
    if any(is_finite(point) and point.loss > top for point in points):
        handles.append(handle("above the figure", marker="^", fillstyle="none", **GREY))
    figure.legend(handles=handles, loc="outside right upper", handlelength=3)


def handle(label: str, **look: Any) -> matplotlib.lines.Line2D:
    """Return an entry of a legend."""
    return matplotlib.lines.Line2D([], [], label=label, **{"ms": 4, "lw": 1.2, **look})


def _by_family(curve: Curve) -> tuple[int, str, bool]:
    known = list(LOOKS).index(curve.family) if curve.family in LOOKS else len(LOOKS)
    return known, curve.family, not curve.momo


# ---------------------------------------------------------------------------------------- over time


def training(curves: Sequence[Curve]) -> Figure | None:
    """Draw training and evaluation losses of each method at its best learning rate, means over seeds."""
    chosen = best_of_each(curves)
    if not any(result.history for curve in chosen for result in curve.best.done):
        return None
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    palette = looks(curves)
    for axes, key, title in zip(panels, ("loss", "eval_loss"), ("training", "evaluation"), strict=True):
        axes.set_title(title, fontsize=8)
        for curve in chosen:
            look = style(curve, palette) | ({"marker": ""} if key == "loss" else {})
            axes.plot(*mean_series(curve.best.done, key), ms=3.5, **look)
    label_outer(figure, list(panels), "step", "loss (nats per token)")
    handles = [
        handle(f"{c.label} at {c.best.learning_rate:g}".replace(", ", "\n"), **style(c, palette))
        for c in sorted(chosen, key=_by_family)
    ]
    figure.legend(handles=handles, loc="outside right upper", handlelength=3)
    return figure


def step_size(curves: Sequence[Curve]) -> Figure | None:
    """Draw τ and η over time: a row for each method with Momo, a column for each of some learning rates."""
    rows = [(curve, points) for curve in best_of_each(curves) if curve.momo and (points := _spread(curve))]
    if not rows:
        return None
    columns = max(len(points) for _, points in rows)
    figure = Figure(figsize=(0.6 + 1.8 * columns, 0.5 + 1.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
    palette = looks(curves)
    for row, column in product(range(len(rows)), range(columns)):
        curve, points = rows[row]
        if column < len(points):
            _step_size_panel(panels[row][column], curve, points[column], palette[curve.family][0])
        else:
            panels[row][column].set_visible(False)
        if column == 0:
            panels[row][0].set_ylabel(curve.method, color=palette[curve.family][0], weight="bold")
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("τ (solid), η (dashed)", fontsize=8)
    return figure


def _step_size_panel(axes: Axes, curve: Curve, point: Point, colour: str) -> None:
    history = (*point.done, *point.diverged)[0].history
    axes.set_yscale("log")
    for key, style, shade in (("learning_rate", "--", "#777777"), ("step_size", "-", colour)):
        shown = [(step, value) for step, value in zip(*series(history, key), strict=True) if value > 0]
        axes.plot([step for step, _ in shown], [value for _, value in shown], style, color=shade, lw=1.1)
    mark = " (best)" if point is curve.best else ""
    axes.set_title(f"η = {point.learning_rate:g}{mark}", fontsize=8)


def _spread(curve: Curve) -> list[Point]:
    """Return a few points evenly over the grid, the best among them."""
    known = [
        point
        for point in curve.points
        if any("step_size" in row for r in (*point.done, *point.diverged)[:1] for row in r.history)
    ]
    if len(known) <= STEP_SIZE_RATES:
        return known
    places = [round(i * (len(known) - 1) / (STEP_SIZE_RATES - 1)) for i in range(STEP_SIZE_RATES)]
    if curve.best in known and (best := known.index(curve.best)) not in places:
        inner = min(range(1, STEP_SIZE_RATES - 1), key=lambda i: abs(places[i] - best))
        places[inner] = best
    return [known[place] for place in sorted(places)]


# ------------------------------------------------------------------------------------------- panels


def grid(count: int, single: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with that many panels that share their axes."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    size = single if count == 1 else (1.6 + 2.1 * columns, 0.4 + 1.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:  # some have only a hidden panel below
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, panels[:count]


def label_outer(figure: Figure, panels: Sequence[Axes], below: str, beside: str) -> None:
    """Label the axes once for all panels."""
    if len(panels) == 1:
        panels[0].set_xlabel(below)
        panels[0].set_ylabel(beside)
    else:
        figure.supxlabel(below, fontsize=8)
        figure.supylabel(beside, fontsize=8)
