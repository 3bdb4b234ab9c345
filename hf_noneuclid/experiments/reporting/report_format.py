"""Numbers and tables as the report prints them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]
Setting = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def per_setting(summary: Summary, make: Callable[[Setting], str]) -> str:
    """Return what `make` says of each setting, under its name if there are several; empty if nothing."""
    texts = [(setting["name"], text) for setting in summary["settings"] if (text := make(setting))]
    if several_settings(summary):
        return "\n\n".join(f"### {name}\n\n{text}" for name, text in texts)
    return "\n\n".join(text for _, text in texts)


def several_settings(summary: Summary) -> bool:
    """Whether there are runs that are not comparable with each other."""
    return len(summary["settings"]) > 1


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


def decades(value: float | None, at_least: bool) -> str:
    """Return a basin width."""
    return "-" if value is None else f"{'≥ ' * at_least}{value:.2f}"


def excess(value: float | None) -> str:
    """Return by how much a loss is above the best, in per cent."""
    return "-" if value is None else f"{100 * value:+.2f} %"
