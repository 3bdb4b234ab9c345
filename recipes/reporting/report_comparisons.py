"""The sections of the report that particular suites have."""

from collections.abc import Mapping
from typing import Any

from reporting.comparisons import FACTORS, VARIANT_OPTIONS
from reporting.measures import ENOUGH_SEEDS
from reporting.report_format import band, excess, loss, number, rate, table

Summary = Mapping[str, Any]


def paper_section(summary: Summary) -> str:
    """Return our figures beside the paper's, with a verdict for each."""
    rows = summary["paper"]
    if not rows:
        return ""
    head = ("method", "ours", "seeds", "learning rate", "paper", "difference", "allowed", "verdict")
    body = [
        [
            *(row["method"], band(row["loss"], row["std"]), str(row["seeds"]), rate(row["learning_rate"])),
            *(band(row["paper_loss"], row["paper_std"]), _signed(row["difference"]), loss(row["allowed"])),
            f"**{row['verdict']}**",
        ]
        for row in rows
    ]
    text = (
        "Allowed: two standard deviations of the difference, 2 √(std² + std²), plus a tolerance of "
        f"{rows[0]['tolerance']:g} nats per token. Fewer than {ENOUGH_SEEDS} seeds at the best learning rate "
        "count as not run."
    )
    return f"## Beside the paper\n\n{text}\n\n{table(head, body)}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def variants_section(summary: Summary) -> str:
    """Return the table of the combinations of descent, norms and Momo, best first."""
    rows = summary["variants"]
    if not rows:
        return ""
    head = ("descent", "product norm", "vector norm", "Momo", "best loss", "at", "regret at the highest rate")
    ranked = sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0))
    body = [
        [
            *(row[name] for name in VARIANT_OPTIONS),
            *(loss(row["loss"]), rate(row["learning_rate"]), loss(row["regret_at_highest"])),
        ]
        for row in ranked
    ]
    return f"## The {len(rows)} variants, best first\n\n{table(head, body)}"


def lower_bound_section(summary: Summary) -> str:
    """Return the final loss under each lower bound, at the same learning rates."""
    rows = summary["lower_bound"]
    if not rows:
        return ""
    head = ("method", "F*", "own best", *(_factor_head(factor) for factor in FACTORS))
    body = [
        [row["method"], row["bound"], _compared(row["own_best"], with_rate=True)]
        + [_compared(row["at"][str(factor)]) for factor in FACTORS]
        for row in rows
    ]
    text = (
        "A method's best learning rate is the one of its lowest loss under any bound, so that the bounds of "
        f"a method stand side by side at the same learning rates: {_rates(rows)}. In brackets: excess over "
        f"the best of the suite, {loss(summary['best_loss'])}. -: not in the grid, or no run has ended."
    )
    return f"## Which lower bound\n\n{text}\n\n{table(head, body)}"


def _rates(rows: list[Mapping[str, Any]]) -> str:
    known = {row["method"]: row["at"]["1"]["learning_rate"] for row in rows if row["at"]["1"]}
    return ", ".join(f"{method} {rate(value)}" for method, value in known.items())


def _factor_head(factor: int) -> str:
    return "at the best learning rate" if factor == 1 else f"at {factor} times it"


def _compared(found: Mapping[str, Any] | None, with_rate: bool = False) -> str:
    if found is None:
        return "-"
    where = f" at {rate(found['learning_rate'])}" if with_rate else ""
    if found["loss"] is None:
        return f"diverged{where}"
    return f"{loss(found['loss'])} ({excess(found['excess'])}){where}"


def batch_size_section(summary: Summary) -> str:
    """Return the best learning rate and loss of each method and batch size."""
    rows = summary["batch_size"]
    if not rows:
        return ""
    head = ("method", "sequences per device and step", "best learning rate", "final loss", "seeds")
    body = [
        [
            *(row["method"], number(row["batch_size"]), rate(row["learning_rate"])),
            *(band(row["loss"], row["std"]), str(row["seeds"])),
        ]
        for row in rows
    ]
    return f"## Batch size\n\n{table(head, body)}"
