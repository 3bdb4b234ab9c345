"""The figures: final loss against learning rate, losses and step sizes over time, the variants."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_noneuclid.experiments.common import STYLE, series, write_whole
from hf_noneuclid.experiments.reporting import panels
from hf_noneuclid.experiments.reporting.curves import (
    Curve,
    Point,
    best_of_each,
    by_setting,
    mean_series,
)
from hf_noneuclid.experiments.reporting.measures import regret
from hf_noneuclid.experiments.reporting.tables import option_words

GREY = {"ls": "none", "color": "#555555"}
STEP_SIZE_RATES = 4
DARK = 0.55  # of the colour map: lighter cells get dark text
CELL_COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="#DDDDDD")
DESCENTS, PRODUCTS = ("constrained", "regularized"), ("linf", "l2", "hybrid")
VECTORS, STEP_SIZES = ("linf", "ada_linf", "ada_l2"), ("rate", "momo")


def draw(folder: Path, curves: Sequence[Curve]) -> None:
    """Writes the figures for which there are runs."""
    figures: dict[str, Callable[[Sequence[Curve]], Figure | None]] = {
        "final_loss.png": final_loss,
        "training.png": training,
        "step_size.png": step_size,
        "variants.png": heat_maps,
    }
    with matplotlib.rc_context(STYLE):
        for name, make in figures.items():
            if (figure := make(curves)) is not None:
                save(folder / name, figure)


def save(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG file."""
    # Without the version of matplotlib, the same figure gives the same bytes.
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=200, metadata={"Software": None}))


# ---------------------------------------------------------------- final loss


def final_loss(curves: Sequence[Curve]) -> Figure | None:
    """Final loss against learning rate, with a panel for each setting and options of the methods."""
    shown = [curve for curve in curves if curve.best and not curve.variant]
    if not shown:
        return None
    look = panels.method_look(curves)
    parts = panels.split(shown, lambda curve: ", ".join(option_words(curve.method_options)))
    methods = {curve.method: curve for curve in shown}
    handles = [
        panels.handle(curve.method, **look(curve)) for curve in sorted(methods.values(), key=panels.by_family)
    ]
    ranges = {name: panels.loss_range(members) for name, members in by_setting(shown).items()}
    figure, grid_axes = panels.grid(len(parts), columns=2 if len(parts) == 4 else 3)
    gone = over = False
    for axes, (name, members) in zip(grid_axes, parts, strict=True):
        limits = ranges[members[0].setting]
        axes.set_ylim(*limits)
        rows = _loss_panel(axes, members, look, limits[1])
        axes.set_title(name or " ", fontsize=8, pad=5 + panels.ROW * rows)
        points = [point for curve in members for point in curve.points]
        gone |= any(point.diverged for point in points)
        over |= any(_is_above(point, limits[1]) for point in points)
    panels.label_outer(figure, grid_axes, "learning rate", "final validation loss (nats)")
    handles += [panels.handle("a seed diverged", marker="x", **GREY)] * gone
    handles += [panels.handle("above the figure", marker="^", fillstyle="none", **GREY)] * over
    figure.legend(handles=handles, loc="outside right upper", handlelength=3)
    return figure


def _loss_panel(axes: Axes, curves: Sequence[Curve], look: panels.Look, top: float) -> int:
    """Draws the curves of a panel; gives the number of rows of marks above its top edge."""
    axes.set_xscale("log")
    rows = 0
    for curve in curves:
        line = look(curve)
        for piece in pieces(curve.points):
            rates = [point.learning_rate for point in piece]
            axes.plot(rates, [point.loss or 0.0 for point in piece], ms=3.5, **line)
            low, high = ([pick(point.losses) for point in piece] for pick in (min, max))
            axes.fill_between(rates, low, high, color=line["color"], alpha=0.18, lw=0)
        gone = [point.learning_rate for point in curve.points if point.diverged]
        over = [point.learning_rate for point in curve.points if _is_above(point, top)]
        if gone or over:
            marks = {"color": line["color"], "ms": 3.5, "ls": "none"}
            panels.mark_above(axes, gone, rows, marker="x", **marks)
            panels.mark_above(axes, over, rows, marker="^", fillstyle="none", **marks)
            rows += 1
    return rows


def pieces(points: Sequence[Point]) -> list[list[Point]]:
    """Splits a curve where a learning rate has no finite loss: no line is drawn across it."""
    groups = itertools.groupby(points, key=lambda point: point.is_finite)
    return [list(members) for is_finite, members in groups if is_finite]


def _is_above(point: Point, top: float) -> bool:
    return point.is_finite and point.loss is not None and point.loss > top


# ---------------------------------------------------------------- over time


def training(curves: Sequence[Curve]) -> Figure | None:
    """Training and evaluation loss of each method at its best learning rate, with a row for each setting."""
    best = [sorted(best_of_each(members), key=panels.by_family) for members in by_setting(curves).values()]
    rows = [chosen for chosen in best if any(run.history for curve in chosen for run in _best_runs(curve))]
    if not rows:
        return None
    look = panels.method_look(curves)
    labels = [
        [f"{curve.label} at {curve.rates[curve.best_place or 0]:g}".replace(", ", "\n") for curve in chosen]
        for chosen in rows
    ]
    # The panels are as high as the legend beside them needs.
    heights = [max(2.3, 0.3 + 0.15 * sum(1 + name.count("\n") for name in names)) for names in labels]
    figure = Figure(figsize=(7.6, 0.4 + sum(heights)), layout="constrained")
    grid_axes = figure.subplots(len(rows), 2, sharex="row", sharey="row", squeeze=False)
    for pair, chosen, names in zip(grid_axes, rows, labels, strict=True):
        for axes, key, part in zip(pair, ("loss", "eval_loss"), ("training", "evaluation"), strict=True):
            axes.set_title(panels.title(part, chosen[0].setting), fontsize=8)
            for curve in chosen:
                line = look(curve) | ({"marker": ""} if key == "loss" else {})
                axes.plot(*mean_series(_best_runs(curve), key), ms=3.5, **line)
        handles = [panels.handle(name, **look(curve)) for name, curve in zip(names, chosen, strict=True)]
        pair[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), handlelength=3)
    panels.label_outer(figure, grid_axes.flatten().tolist(), "step", "loss (nats)")
    return figure


def _best_runs(curve: Curve) -> Sequence[Any]:
    return curve.best.done if curve.best else ()


def step_size(curves: Sequence[Curve]) -> Figure | None:
    """τ and η over time, with a column for each of some learning rates.

    There is a row for each setting and method with Momo or the slope, with its best options.
    """
    best = [curve for members in by_setting(curves).values() for curve in best_of_each(members)]
    rows = [(curve, points) for curve in best if curve.step_size != "rate" and (points := _spread(curve))]
    if not rows:
        return None
    columns = max(len(points) for _, points in rows)
    figure = Figure(figsize=(0.9 + 1.8 * columns, 0.5 + 1.5 * len(rows)), layout="constrained")
    sharex: Any = "row" if any(curve.setting for curve, _ in rows) else True
    grid_axes = figure.subplots(len(rows), columns, sharex=sharex, sharey=True, squeeze=False)
    look = panels.method_look(curves)
    for row, (curve, points) in zip(grid_axes, rows, strict=True):
        colour = look(curve)["color"]
        words = panels.title(curve.label, curve.setting).replace(", ", "\n")
        row[0].set_ylabel(words, color=colour, fontsize=7)
        for axes in row[len(points) :]:
            axes.set_visible(False)
        for axes, point in zip(row, points, strict=False):
            _step_size_panel(axes, point, colour, " (best)" if point is curve.best else "")
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("τ (solid), η (dashed)", fontsize=8)
    return figure


def _step_size_panel(axes: Axes, point: Point, colour: str, mark: str) -> None:
    axes.set_yscale("log")
    for key, line, shade in (("learning_rate", "--", "#777777"), ("step_size", "-", colour)):
        shown = [pair for pair in zip(*series(_first_history(point), key), strict=True) if pair[1] > 0]
        axes.plot([step for step, _ in shown], [value for _, value in shown], line, color=shade, lw=1.1)
    axes.set_title(f"η = {point.learning_rate:g}{mark}", fontsize=8)


def _first_history(point: Point) -> list[dict[str, Any]]:
    return next((run.history for run in (*point.done, *point.diverged)), [])


def _spread(curve: Curve) -> list[Point]:
    """A few points evenly spread over the grid, with the best one."""
    known = [point for point in curve.points if any("step_size" in row for row in _first_history(point))]
    if len(known) <= STEP_SIZE_RATES:
        return known
    places = [round(i * (len(known) - 1) / (STEP_SIZE_RATES - 1)) for i in range(STEP_SIZE_RATES)]
    if curve.best in known and (best := known.index(curve.best)) not in places:
        inner = min(range(1, STEP_SIZE_RATES - 1), key=lambda i: abs(places[i] - best))
        places[inner] = best
    return [known[place] for place in sorted(places)]


# ---------------------------------------------------------------- variants


def heat_maps(curves: Sequence[Curve]) -> Figure | None:
    """The best loss of each variant, and its regret at the highest learning rate; a row for each setting."""
    settings = by_setting(curve for curve in curves if curve.variant)
    known = {name: members for name, members in settings.items() if any(c.best for c in members)}
    if not known:
        return None
    figure = Figure(figsize=(7.6, 0.2 + 3.4 * len(known)), layout="constrained")
    grid_axes = figure.subplots(len(known), 2, sharey=True, squeeze=False)
    for (left, right), (name, members) in zip(grid_axes, known.items(), strict=True):
        losses = {curve.variant: curve.best.loss if curve.best else None for curve in members}
        regrets = {curve.variant: regret(curve.losses, curve.best_place)[-1] for curve in members}
        regret_title = f"regret at learning rate {max(curve.rates[-1] for curve in members):g} (nats)"
        _heat_map(figure, left, losses, "\n".join(filter(None, ("best final loss (nats)", name))))
        _heat_map(figure, right, regrets, "\n".join(filter(None, (regret_title, name))))
        left.set_ylabel("descent, product norm")
    figure.supxlabel("vector norm (+ Momo)", fontsize=8)
    return figure


def _heat_map(
    figure: Figure, axes: Axes, found: Mapping[tuple[str, ...], float | None], heading: str
) -> None:
    rows = list(itertools.product(DESCENTS, PRODUCTS))
    columns = [(vector, momo) for momo in STEP_SIZES for vector in VECTORS]
    cells = [[found.get((*row, *column)) for column in columns] for row in rows]
    values = np.array([[math.nan if cell is None else cell for cell in line] for line in cells])
    image = axes.imshow(np.ma.masked_invalid(values), cmap=CELL_COLOURS, aspect="auto")
    names = [f"{vector} +Momo" if momo == "momo" else vector for vector, momo in columns]
    axes.set_xticks(range(len(columns)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), [", ".join(row) for row in rows])
    axes.set_title(heading, fontsize=8)
    norm: Any = image.norm
    for (row, column), value in np.ndenumerate(values):
        dark = not math.isfinite(value) or norm(float(value)) > DARK
        text = "-" if math.isnan(value) else "div." if math.isinf(value) else f"{value:.3f}"
        axes.text(column, row, text, ha="center", va="center", size=6, color="black" if dark else "white")
    figure.colorbar(image, ax=axes, shrink=0.8)
