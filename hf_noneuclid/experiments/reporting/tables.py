"""Numbers as the report prints them, and tables for each setting."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def per_setting(settings: Mapping[str, T], make: Callable[[T], str]) -> str:
    """The text that ``make`` gives for each setting, under its name if there are several."""
    texts = [(name, text) for name, content in settings.items() if (text := make(content))]
    if len(settings) > 1:
        return "\n\n".join(f"### {name}\n\n{text}" for name, text in texts)
    return "\n\n".join(text for _, text in texts)


def loss(value: float | None) -> str:
    """Nats per token: ``-`` where it is not known, ``diverged`` for infinity."""
    if value is None:
        return "-"
    return "diverged" if math.isinf(value) else f"{value:.4f}"


def band(mean: float | None, std: float | None) -> str:
    """Mean ± standard deviation; a single seed has none."""
    return "-" if mean is None else f"{mean:.4f} ± {'-' if std is None else f'{std:.4f}'}"


def rate(value: float | None) -> str:
    """A learning rate."""
    return "-" if value is None else f"{value:g}"


def number(value: float | None) -> str:
    """A count or a time."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def excess(value: float | None) -> str:
    """The part by which a loss is above the best, in per cent."""
    return "-" if value is None else f"{100 * value:+.2f} %"
