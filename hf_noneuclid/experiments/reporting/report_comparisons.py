"""The sections of the report that particular suites have."""

from collections.abc import Mapping
from typing import Any

from hf_noneuclid.experiments.reporting.comparisons import VARIANT_OPTIONS
from hf_noneuclid.experiments.reporting.lower_bounds import FACTORS
from hf_noneuclid.experiments.reporting.measures import ENOUGH_SEEDS
from hf_noneuclid.experiments.reporting.report_format import (
    Setting,
    Summary,
    band,
    excess,
    loss,
    number,
    per_setting,
    rate,
    several_settings,
    table,
)
from hf_noneuclid.experiments.sweeping.suite import as_text


def paper_section(summary: Summary) -> str:
    """Return our figures beside the paper's, with a verdict for each."""
    tables = per_setting(summary, _paper_table)
    if not tables:
        return ""
    tolerance = next(row["tolerance"] for setting in summary["settings"] for row in setting["paper"])
    text = (
        "Allowed: two standard deviations of the difference, 2 √(std² + std²), plus a tolerance of "
        f"{tolerance:g} nats per token. Fewer than {ENOUGH_SEEDS} seeds at the best learning rate "
        "count as not run."
    )
    return f"## Beside the paper\n\n{text}\n\n{tables}"


def _paper_table(setting: Setting) -> str:
    head = ("method", "ours", "seeds", "learning rate", "paper", "difference", "allowed", "verdict")
    body = [
        [
            *(row["method"], band(row["loss"], row["std"]), str(row["seeds"]), rate(row["learning_rate"])),
            *(band(row["paper_loss"], row["paper_std"]), _signed(row["difference"]), loss(row["allowed"])),
            f"**{row['verdict']}**",
        ]
        for row in setting["paper"]
    ]
    return table(head, body) if body else ""


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def variants_section(summary: Summary) -> str:
    """Return the table of the combinations of descent, norms and Momo, best first."""
    tables = per_setting(summary, _variants_table)
    count = max(len(setting["variants"]) for setting in summary["settings"])
    return f"## The {count} variants, best first\n\n{tables}" if tables else ""


def _variants_table(setting: Setting) -> str:
    head = ("descent", "product norm", "vector norm", "Momo", "best loss", "at", "regret at the highest rate")
    ranked = sorted(setting["variants"], key=lambda row: (row["loss"] is None, row["loss"] or 0.0))
    body = [
        [
            *(row[name] for name in VARIANT_OPTIONS),
            *(loss(row["loss"]), rate(row["learning_rate"]), loss(row["regret_at_highest"])),
        ]
        for row in ranked
    ]
    return table(head, body) if body else ""


def lower_bound_section(summary: Summary) -> str:
    """Return the final loss under each lower bound, at the same learning rates."""
    tables = per_setting(summary, _bounds)
    if not tables:
        return ""
    here = " in the same setting" * several_settings(summary)
    text = (
        "F* is the lower bound of the loss: a number, or a rule with its fraction. A method's best learning "
        f"rate is the one of its lowest loss under any bound{here}, so that the bounds of a method stand "
        "side by side at the same learning rates. In brackets: excess over the best of the same method"
        f"{here}. -: not in the grid, or no run has ended."
    )
    return f"## Which lower bound\n\n{text}\n\n{tables}"


def _bounds(setting: Setting) -> str:
    found = setting["lower_bound"]
    if not found or not found["bounds"]:
        return ""
    head = ("method", "F*", "own best", *(_factor_head(factor) for factor in FACTORS))
    body = [
        [row["method"], row["bound"], _compared(row["own_best"], with_rate=True)]
        + [_compared(row["at"][str(factor)]) for factor in FACTORS]
        for row in found["bounds"]
    ]
    bests = "; ".join(f"{row['method']} {_best(row)}" for row in found["methods"])
    return f"Best under any bound: {bests}.\n\n{table(head, body)}"


def _best(row: Mapping[str, Any]) -> str:
    above = f", {excess(row['excess'])} over the best of any method" if row["excess"] else ""
    return f"{loss(row['loss'])} at {rate(row['learning_rate'])}{above}"


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
    names = sorted({name for row in rows for name in row["options"]})
    head = ("method", "sequences per device and step", *names, "best learning rate", "final loss", "seeds")
    body = [
        [
            *(row["label"], number(row["batch_size"])),
            *(as_text(row["options"][name]) if name in row["options"] else "-" for name in names),
            *(rate(row["learning_rate"]), band(row["loss"], row["std"]), str(row["seeds"])),
        ]
        for row in rows
    ]
    return f"## Batch size\n\n{table(head, body)}"
