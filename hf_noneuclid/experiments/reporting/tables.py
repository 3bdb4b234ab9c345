"""How the report writes numbers, settings, and the options of methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hf_noneuclid.experiments.sweeping.suite import as_text

COMMON = "common options"  # the name of a setting without options of its own
PREFIX = "per_device_train_"  # of an option; too long for a title

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


# ---------------------------------------------------------------- names


def option_words(method_options: Mapping[str, Any]) -> list[str]:
    """The options of a method as its label shows them."""
    return [f"{key}={as_text(value)}" for key, value in method_options.items()]


def setting_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of several different settings; empty where there is only one.

    A value that is a list of pairs, such as n_layer=4,n_embd=128, is shown without the name of its option and
    without the pairs that all settings have.
    """
    if len(settings) < 2:
        return [""] * len(settings)
    shared = {
        key: set.intersection(*(set(_pairs(options.get(key))) for options in settings)) for key in settings[0]
    }
    names = [_setting_name(options, shared) for options in settings]
    return names if len(set(names)) == len(names) else [_setting_name(options, {}) for options in settings]


def _setting_name(options: Mapping[str, Any], shared: Mapping[str, set[str]]) -> str:
    words: list[str] = []
    for key, value in sorted(options.items(), key=lambda item: item[0].removeprefix(PREFIX)):
        own = [pair for pair in _pairs(value) if pair not in shared.get(key, ())]
        words += own if _pairs(value) else [f"{key.removeprefix(PREFIX)}={as_text(value)}"]
    return ", ".join(words) or COMMON


def _pairs(value: Any) -> list[str]:
    """The pairs of a value such as n_layer=4,n_embd=128; none for other values."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    return parts if all("=" in part for part in parts) else []
