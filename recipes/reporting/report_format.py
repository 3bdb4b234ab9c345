"""Numbers and tables as the report prints them."""

import math
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def loss(value: float | None) -> str:
    """Return nats per token, `-` for what is not known, `diverged` for infinity."""
    if value is None:
        return "-"
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def band(mean: float | None, std: float | None) -> str:
    """Return mean ± standard deviation, the latter `-` of a single seed."""
    return "-" if mean is None else f"{mean:.4f} ± {'-' if std is None else f'{std:.4f}'}"


def rate(value: float | None) -> str:
    """Return a learning rate."""
    return "-" if value is None else f"{value:g}"


def number(value: float | None) -> str:
    """Return a count or a time."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def decades(value: float, at_least: bool) -> str:
    """Return a basin width."""
    return f"{'≥ ' * at_least}{value:.2f}"


def excess(value: float | None) -> str:
    """Return by how much a loss is above the best, in per cent."""
    return "-" if value is None else f"{100 * value:+.2f} %"
