"""The figures of particular suites: the 36 variants, lower bounds, batch sizes."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.comparisons import (
    BATCH_SIZE,
    VARIANT_OPTIONS,
    bound_name,
    fixed_bound,
    methods_of,
    order,
    variants,
    with_lower_bound,
)
from reporting.curves import Curve
from reporting.figures import (
    COLUMNS,
    LOSS_LABEL,
    RATE_LABEL,
    ROW,
    draw,
    grid,
    handle,
    is_finite,
    label_outer,
    looks,
    loss_limits,
    mark_above,
    style,
)

DARK = 0.55  # of the colour map: lighter cells get dark text
CELL_COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="#DDDDDD")
RATE_COLOURS = matplotlib.colormaps["viridis"]
DESCENTS, PRODUCTS = ("constrained", "regularized"), ("linf", "l2", "hybrid")
VECTORS, MOMENTS = ("linf", "ada_linf", "ada_l2"), ("false", "true")


def draw_comparisons(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """Write the figures that the suite's options call for; return the names of their files."""
    figures: dict[str, Callable[[Sequence[Curve]], Figure | None]] = {
        "variants.png": heat_maps,
        "lower_bound.png": against_lower_bound,
        "batch_size.png": against_batch_size,
    }
    return draw(folder, figures, curves)


# ---------------------------------------------------------------------------------------- variants


def heat_maps(curves: Sequence[Curve]) -> Figure | None:
    """Draw the best loss of each variant, and its regret at the highest learning rate."""
    found = {tuple(row[name] for name in VARIANT_OPTIONS): row for row in variants(curves)}
    if not any(row["loss"] is not None for row in found.values()):
        return None
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _heat_map(figure, left, found, "loss", "best final loss (nats per token)")
    highest = max(row["highest_learning_rate"] for row in found.values())
    _heat_map(
        figure, right, found, "regret_at_highest", f"regret at learning rate {highest:g} (nats per token)"
    )
    left.set_ylabel("descent, product norm")
    figure.supxlabel("vector norm (+ Momo)", fontsize=8)
    return figure


def _heat_map(
    figure: Figure, axes: Axes, found: dict[tuple[str, ...], dict[str, Any]], key: str, title: str
) -> None:
    rows = [(descent, product) for descent in DESCENTS for product in PRODUCTS]
    columns = [(vector, momo) for momo in MOMENTS for vector in VECTORS]
    cells = [[found.get((*row, *column)) for column in columns] for row in rows]
    values = np.array([[_number(cell, key) for cell in line_of_cells] for line_of_cells in cells])
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=CELL_COLOURS, aspect="auto")
    axes.set_xticks(
        range(len(columns)), [f"{v}{' +Momo' * (m == 'true')}" for v, m in columns], rotation=35, ha="right"
    )
    axes.set_yticks(range(len(rows)), [f"{descent}, {product}" for descent, product in rows])
    axes.set_title(title, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        dark = not math.isfinite(value) or image.norm(value) > DARK
        text = _cell_text(value)
        axes.text(column, row, text, ha="center", va="center", size=6, color="black" if dark else "white")
    figure.colorbar(image, ax=axes, shrink=0.8)


def _number(cell: dict[str, Any] | None, key: str) -> float:
    return math.nan if cell is None or cell[key] is None else cell[key]


def _cell_text(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "div." if math.isinf(value) else f"{value:.3f}"


# ------------------------------------------------------------------------------------- lower bound


def against_lower_bound(curves: Sequence[Curve]) -> Figure | None:
    """Draw final loss against F*, a panel for each method and a line for each learning rate.

    The numbers are joined; the rules stand beside them, each a place of its own.
    """
    chosen = sorted((curve for curve in with_lower_bound(curves) if curve.best), key=order)
    if not chosen:
        return None
    methods = methods_of(chosen)
    figure, panels = grid(len(methods), single=(5.2, 3.4))
    rows = -(-len(methods) // COLUMNS)
    figure.set_size_inches(1.4 + 3.0 * min(len(methods), COLUMNS), 0.6 + 3.2 * rows)
    rates = sorted({rate for curve in chosen for rate in curve.rates})
    places = {name: i for i, name in enumerate(dict.fromkeys(map(bound_name, chosen)))}
    top = loss_limits(panels[0], chosen)
    for axes, method in zip(panels, methods, strict=True):
        members = [curve for curve in chosen if curve.method == method]
        used = [_bound_line(axes, members, places, rate, rates, top) for rate in rates]
        axes.set_title(method, fontsize=8, pad=5 + ROW * len(rates) * any(used))
        shown = [name.replace(", ", "\n") for name in places]
        axes.set_xticks(range(len(places)), shown, rotation=60, ha="right")
    label_outer(figure, panels, "lower bound F* (nats per token, or a rule)", LOSS_LABEL)
    handles = [handle(f"{rate:g}", color=_rate_colour(rate, rates), marker="o") for rate in rates]
    figure.legend(handles=handles, loc="outside right upper", title=RATE_LABEL)
    return figure


def _bound_line(
    axes: Axes, curves: Sequence[Curve], places: dict[str, int], rate: float, rates: list[float], top: float
) -> bool:
    """Draw the losses at one learning rate; return whether some are marked above the top edge."""
    colour = _rate_colour(rate, rates)
    points = [(curve, curve.points[curve.rates.index(rate)]) for curve in curves if rate in curve.rates]
    for fixed, joined in ((True, "-"), (False, "none")):
        part = [(c, p) for c, p in points if (fixed_bound(c) is not None) == fixed]
        where = [places[bound_name(curve)] for curve, _ in part]
        losses = [point.loss if is_finite(point) else math.nan for _, point in part]  # nan cuts the line
        axes.plot(where, losses, ls=joined, color=colour, marker="o", ms=3, lw=1)
    gone = [places[bound_name(c)] for c, p in points if p.diverged or (is_finite(p) and p.loss > top)]
    mark_above(axes, gone, rates.index(rate), color=colour, ms=3.5, ls="none", marker="x")
    return bool(gone)


def _rate_colour(rate: float, rates: Sequence[float]) -> tuple[float, ...]:
    return RATE_COLOURS(0.88 * rates.index(rate) / max(1, len(rates) - 1))


# -------------------------------------------------------------------------------------- batch size


def against_batch_size(curves: Sequence[Curve]) -> Figure | None:
    """Draw the best learning rate and the loss there against the batch size."""
    chosen = [curve for curve in curves if BATCH_SIZE in curve.options and curve.best]
    if not chosen:
        return None
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    rates, losses = figure.subplots(1, 2)
    palette = looks(curves)
    for method in methods_of(chosen):
        members = sorted((c for c in chosen if c.method == method), key=lambda c: c.options[BATCH_SIZE])
        sizes = [curve.options[BATCH_SIZE] for curve in members]
        look = style(members[0], palette)
        rates.plot(sizes, [curve.best.learning_rate for curve in members], label=method, ms=4, **look)
        losses.plot(sizes, [curve.best.loss for curve in members], ms=4, **look)
    for axes, label in ((rates, "best learning rate"), (losses, LOSS_LABEL)):
        _batch_axis(axes, sorted({curve.options[BATCH_SIZE] for curve in chosen}))
        axes.set_ylabel(label)
    rates.set_yscale("log")
    figure.legend(loc="outside right upper", handlelength=3)
    return figure


def _batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("sequences per device and step")
