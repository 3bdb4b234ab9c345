"""The sections of the report that compare methods: the paper, the variants.

All their numbers come from the curves that results.json holds.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hf_noneuclid.experiments.common import InputError, markdown_table
from hf_noneuclid.experiments.reporting import measures
from hf_noneuclid.experiments.reporting.curves import Curve, Point, best_of_each, by_setting
from hf_noneuclid.experiments.reporting.tables import band, loss, per_setting, rate

VARIANT_OPTIONS = ("descent", "product_norm", "vector_norm", "step_size")


def paper_section(settings: Mapping[str, Any], curves: Sequence[Curve]) -> str:
    """Our figures and the paper's, with a verdict for each; empty where the suite has none of the paper's.

    Args:
        settings: The suite's ``report``: ``paper`` (mean and std of each method, in nats per token) and
            ``tolerance`` (nats per token, by default 0).
        curves: The curves of all settings.
    """
    if not settings.get("paper"):
        return ""
    tolerance = float(settings.get("tolerance", 0.0))
    text = (
        "Allowed: two standard deviations of the difference, 2 √(std² + std²), plus a tolerance of "
        f"{tolerance:g} nats per token. Fewer than {measures.ENOUGH_SEEDS} seeds at the best learning rate "
        "count as not run."
    )
    table = partial(_paper_table, settings["paper"], tolerance)
    return f"## Comparison with the paper\n\n{text}\n\n{per_setting(by_setting(curves), table)}"


def _paper_table(paper: Mapping[str, Any], tolerance: float, curves: Sequence[Curve]) -> str:
    head = ("method", "ours", "seeds", "learning rate", "paper", "difference", "allowed", "verdict")
    best = {curve.method: curve.best for curve in best_of_each(curves)}
    rows = []
    for method, figures in paper.items():
        try:
            mean, std = float(figures["mean"]), float(figures["std"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"report: paper: {method} is {figures}; it needs a mean and a std, in nats per token"
            ) from None
        point = best.get(method)
        losses = point.losses if point else []
        found = measures.verdict(losses, mean, std, tolerance)
        difference = "-" if found.difference is None else f"{found.difference:+.4f}"
        ours = [method, _band(point), str(len(losses)), _at(point)]
        rows.append([*ours, band(mean, std), difference, loss(found.allowed), f"**{found.word}**"])
    return markdown_table(head, rows)


def _band(point: Point | None) -> str:
    return band(*measures.mean_std(point.losses)) if point and point.done else "-"


def _at(point: Point | None) -> str:
    return rate(point.learning_rate if point else None)


def is_variant(curve: Curve) -> bool:
    """Whether all four choices of a method vary in the suite."""
    return set(VARIANT_OPTIONS) <= set(curve.method_options)


def variant_of(curve: Curve) -> tuple[str, ...]:
    """The descent, product norm, vector norm and step size of a variant."""
    return tuple(str(curve.method_options[name]) for name in VARIANT_OPTIONS)


def variants_section(curves: Sequence[Curve]) -> str:
    """The table of the combinations of descent, norms and Momo, lowest loss first."""
    chosen = [curve for curve in curves if is_variant(curve)]
    if not chosen:
        return ""

    def table(members: Sequence[Curve]) -> str:
        head = [name.replace("_", " ") for name in VARIANT_OPTIONS]
        head += ["best loss", "at", "regret at the highest rate"]
        rows = []
        for curve in sorted(members, key=lambda curve: curve.best_loss):
            best, last = curve.best, measures.regret(curve.losses, curve.best_place)[-1]
            found = [loss(best.loss if best else None), _at(best), loss(last)]
            rows.append([*variant_of(curve), *found])
        return markdown_table(head, rows)

    groups = by_setting(chosen)
    count = max(map(len, groups.values()))
    return f"## The {count} variants, lowest loss first\n\n{per_setting(groups, table)}"
