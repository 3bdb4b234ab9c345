"""The figures over time: losses and step sizes."""

from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_noneuclid.experiments.common import series
from hf_noneuclid.experiments.reporting.curves import Curve, Point, best_of_each, by_setting, mean_series
from hf_noneuclid.experiments.reporting.panels import by_family, handle, label_outer, looks, style, title

STEP_SIZE_RATES = 4
PARTS = (("loss", "training"), ("eval_loss", "evaluation"))


def training(curves: Sequence[Curve]) -> Figure | None:
    """Draw training and evaluation losses of each method at its best learning rate, means over seeds.

    A row for each setting.
    """
    best = map(best_of_each, by_setting(curves).values())
    rows = [chosen for chosen in best if any(r.history for curve in chosen for r in curve.best.done)]
    if not rows:
        return None
    figure = Figure(figsize=(7.6, 0.4 + sum(map(_height, rows))), layout="constrained")
    panels = figure.subplots(len(rows), 2, sharex="row", sharey="row", squeeze=False)
    palette = looks(curves)
    for pair, chosen in zip(panels, rows, strict=True):
        _training_row(pair, sorted(chosen, key=by_family), palette)
    label_outer(figure, panels.flatten().tolist(), "step", "loss (nats)")
    return figure


def _height(chosen: Sequence[Curve]) -> float:
    """Return the inches that the panels and the legend beside them need."""
    return max(2.3, 0.3 + 0.15 * sum(1 + _entry(curve).count("\n") for curve in chosen))


def _training_row(pair: Sequence[Axes], chosen: Sequence[Curve], palette: dict[str, tuple[str, str]]) -> None:
    for axes, (key, part) in zip(pair, PARTS, strict=True):
        axes.set_title(title(part, chosen[0].setting), fontsize=8)
        for curve in chosen:
            look = style(curve, palette) | ({"marker": ""} if key == "loss" else {})
            axes.plot(*mean_series(curve.best.done, key), ms=3.5, **look)
    handles = [handle(_entry(curve), **style(curve, palette)) for curve in chosen]
    pair[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), handlelength=3)


def _entry(curve: Curve) -> str:
    return f"{curve.label} at {curve.best.learning_rate:g}".replace(", ", "\n")


def step_size(curves: Sequence[Curve]) -> Figure | None:
    """Draw τ and η over time, a column for each of some learning rates.

    A row for each setting and method with Momo, with its best options.
    """
    best = [curve for members in by_setting(curves).values() for curve in best_of_each(members)]
    rows = [(curve, points) for curve in best if curve.momo and (points := _spread(curve))]
    if not rows:
        return None
    columns = max(len(points) for _, points in rows)
    figure = Figure(figsize=(0.9 + 1.8 * columns, 0.5 + 1.5 * len(rows)), layout="constrained")
    steps = "row" if any(curve.setting for curve, _ in rows) else True
    panels = figure.subplots(len(rows), columns, sharex=steps, sharey=True, squeeze=False)
    palette = looks(curves)
    for row, column in product(range(len(rows)), range(columns)):
        curve, points = rows[row]
        colour = palette[curve.family][0]
        if column < len(points):
            _step_size_panel(panels[row][column], curve, points[column], colour)
        else:
            panels[row][column].set_visible(False)
        if column == 0:
            words = title(curve.label, curve.setting).replace(", ", "\n")
            panels[row][0].set_ylabel(words, color=colour, fontsize=7)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("τ (solid), η (dashed)", fontsize=8)
    return figure


def _step_size_panel(axes: Axes, curve: Curve, point: Point, colour: str) -> None:
    history = (*point.done, *point.diverged)[0].history
    axes.set_yscale("log")
    for key, line, shade in (("learning_rate", "--", "#777777"), ("step_size", "-", colour)):
        shown = [(step, value) for step, value in zip(*series(history, key), strict=True) if value > 0]
        axes.plot([step for step, _ in shown], [value for _, value in shown], line, color=shade, lw=1.1)
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
