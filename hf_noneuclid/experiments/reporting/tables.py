"""How the report writes numbers, settings, and the options and lower bounds F* of methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hf_noneuclid.experiments.sweeping.suite import as_text

LOWER_BOUND, FRACTION, SLACK = "loss_lower_bound", "lower_bound_fraction", "lower_bound_slack"
RULES = ("star", "relative", "auto")
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
    """The options of a method as its label shows them, the lower bound in short."""
    is_bounded = LOWER_BOUND in method_options
    bound = [f"F* {bound_name(method_options)}"] if is_bounded else []
    hidden = (LOWER_BOUND, FRACTION, SLACK) if is_bounded else ()
    return bound + [f"{key}={as_text(value)}" for key, value in method_options.items() if key not in hidden]


def bound_name(method_options: Mapping[str, Any]) -> str:
    """The lower bound in short: 0, 3.5, star, relative 0.7, auto 0.7, auto slack 0, or default."""
    rule = method_options.get(LOWER_BOUND, "default")
    words = [rule if isinstance(rule, str) else f"{rule:g}"]
    if FRACTION in method_options:
        words.append(str(method_options[FRACTION]))
    if SLACK in method_options:
        words.append(f"slack {method_options[SLACK]:g}")
    return " ".join(words)


def bound_order(method_options: Mapping[str, Any]) -> tuple[int, float, float, str]:
    """Sorts numbers first, then the rules, each by its fraction and slack."""
    rule = method_options.get(LOWER_BOUND)
    if isinstance(rule, int | float):
        return 0, rule, 0.0, ""
    place = 1 + RULES.index(rule) if rule in RULES else 1 + len(RULES)
    fraction, slack = (float(method_options.get(name) or 0.0) for name in (FRACTION, SLACK))
    return place, fraction, slack, str(rule)


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
