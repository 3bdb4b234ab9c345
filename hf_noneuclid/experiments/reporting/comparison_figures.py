"""The figures of particular suites: the 36 variants, lower bounds, batch sizes."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_noneuclid.experiments.reporting.bounds import fixed_bound
from hf_noneuclid.experiments.reporting.comparisons import (
    BATCH_SIZE,
    VARIANT_OPTIONS,
    beside_batch_size,
    is_variant,
    variants,
)
from hf_noneuclid.experiments.reporting.curves import Curve, best_of_each, by_setting, methods_of
from hf_noneuclid.experiments.reporting.lower_bounds import bound_of, order, with_lower_bound
from hf_noneuclid.experiments.reporting.panels import (
    LOSS_LABEL,
    RATE_LABEL,
    ROW,
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
    title,
)

DARK = 0.55  # of the colour map: lighter cells get dark text
SPREAD = 0.3  # of the way to the next bound, over the learning rates: where losses are equal, all are seen
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
    """Draw the best loss of each variant, and its regret at the highest learning rate.

    A row for each setting.
    """
    settings = by_setting(curve for curve in curves if is_variant(curve))
    known = {name: members for name, members in settings.items() if any(c.best for c in members)}
    if not known:
        return None
    figure = Figure(figsize=(7.6, 0.2 + 3.4 * len(known)), layout="constrained")
    panels = figure.subplots(len(known), 2, sharey=True, squeeze=False)
    for pair, (name, members) in zip(panels, known.items(), strict=True):
        _heat_row(figure, pair, name, members)
    figure.supxlabel("vector norm (+ Momo)", fontsize=8)
    return figure


def _heat_row(figure: Figure, pair: Sequence[Axes], name: str, curves: Sequence[Curve]) -> None:
    found = {tuple(row[option] for option in VARIANT_OPTIONS): row for row in variants(curves)}
    highest = max(row["highest_learning_rate"] for row in found.values())
    best, regret = "best final loss (nats)", f"regret at learning rate {highest:g} (nats)"
    for axes, key, what in zip(pair, ("loss", "regret_at_highest"), (best, regret), strict=True):
        _heat_map(figure, axes, found, key, "\n".join(filter(None, (what, name))))
    pair[0].set_ylabel("descent, product norm")


def _heat_map(
    figure: Figure, axes: Axes, found: dict[tuple[str, ...], dict[str, Any]], key: str, heading: str
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
    axes.set_title(heading, fontsize=8)
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
    """Draw final loss against F*, a panel for each setting and method, a line for each learning rate.

    The numbers are joined; the rules stand beside them, each a place of its own.
    """
    chosen = [curve for curve in with_lower_bound(curves) if curve.best]
    if not chosen:
        return None
    names = dict.fromkeys(bound_of(curve) for curve in sorted(chosen, key=order))
    places = {name: i for i, name in enumerate(names)}
    rates = sorted({rate for curve in chosen for rate in curve.rates})
    parts = split(chosen, lambda curve: curve.method)
    ranges = {name: loss_range(members) for name, members in by_setting(chosen).items()}
    figure, panels = grid(len(parts), columns(parts, True), single=(5.2, 3.4))
    for axes, (name, members) in zip(panels, parts, strict=True):
        low, top = ranges[members[0].setting]
        axes.set_ylim(low, top)
        by_bound = sorted(members, key=order)
        used = [_bound_line(axes, by_bound, places, rate, rates, top) for rate in rates]
        axes.set_title(name, fontsize=8, pad=5 + ROW * len(rates) * any(used))
        axes.set_xticks(range(len(places)), places, rotation=60, ha="right", rotation_mode="anchor")
    label_outer(figure, panels, "lower bound F* (nats, or a rule)", LOSS_LABEL)
    handles = [handle(f"{rate:g}", color=_rate_colour(rate, rates), marker="o") for rate in rates]
    figure.legend(handles=handles, loc="outside right upper", title=RATE_LABEL)
    return figure


def _bound_line(
    axes: Axes, curves: Sequence[Curve], places: dict[str, int], rate: float, rates: list[float], top: float
) -> bool:
    """Draw the losses at one learning rate; return whether some are marked above the top edge."""
    colour = _rate_colour(rate, rates)
    aside = SPREAD * (rates.index(rate) / max(1, len(rates) - 1) - 0.5)
    points = [(curve, curve.points[curve.rates.index(rate)]) for curve in curves if rate in curve.rates]
    for fixed, joined in ((True, "-"), (False, "none")):
        part = [(c, p) for c, p in points if (fixed_bound(c.method_options) is not None) == fixed]
        where = [places[bound_of(curve)] + aside for curve, _ in part]
        losses = [point.loss if is_finite(point) else math.nan for _, point in part]  # nan cuts the line
        axes.plot(where, losses, ls=joined, color=colour, marker="o", ms=3, lw=1)
    gone = [places[bound_of(c)] + aside for c, p in points if p.diverged or (is_finite(p) and p.loss > top)]
    mark_above(axes, gone, rates.index(rate), color=colour, ms=3.5, ls="none", marker="x")
    return bool(gone)


def _rate_colour(rate: float, rates: Sequence[float]) -> tuple[float, ...]:
    return RATE_COLOURS(0.88 * rates.index(rate) / max(1, len(rates) - 1))


# -------------------------------------------------------------------------------------- batch size


def against_batch_size(curves: Sequence[Curve]) -> Figure | None:
    """Draw each method's best learning rate and the loss there against the batch size.

    A row for each setting of the options beside the batch size and the number of steps.
    """
    best = [curve for members in by_setting(curves).values() for curve in best_of_each(members)]
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in best:
        if BATCH_SIZE in curve.options:
            groups[beside_batch_size(curve)].append(curve)
    if not groups:
        return None
    figure = Figure(figsize=(7.6, 2.9 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for pair, (name, members) in zip(panels, groups.items(), strict=True):
        _batch_size_row(pair, name, members, looks(curves))
    return figure


def _batch_size_row(
    pair: Sequence[Axes], name: str, curves: Sequence[Curve], palette: dict[str, tuple[str, str]]
) -> None:
    rates, losses = pair
    for method in methods_of(curves):
        members = sorted((c for c in curves if c.method == method), key=lambda c: c.options[BATCH_SIZE])
        sizes = [curve.options[BATCH_SIZE] for curve in members]
        look = style(members[0], palette)
        rates.plot(sizes, [curve.best.learning_rate for curve in members], label=method, ms=4, **look)
        losses.plot(sizes, [curve.best.loss for curve in members], label=method, ms=4, **look)
    for axes, label in ((rates, "best learning rate"), (losses, LOSS_LABEL)):
        _batch_axis(axes, sorted({curve.options[BATCH_SIZE] for curve in curves}))
        axes.set_ylabel(label)
        axes.set_title(title(name), fontsize=8)
    rates.set_yscale("log")
    losses.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), handlelength=3)


def _batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("sequences per device and step")
