"""Lower bounds F* by their short names: 0, 3.5, star, relative 0.7, auto 0.7, auto slack 0."""

from collections.abc import Mapping
from typing import Any

from hf_noneuclid.experiments.sweeping.suite import as_text

LOWER_BOUND, FRACTION, SLACK = "loss_lower_bound", "lower_bound_fraction", "lower_bound_slack"
RULES = ("star", "relative", "auto")


def fixed_bound(method_options: Mapping[str, Any]) -> float | None:
    """Return the bound if it is a number."""
    try:
        return float(method_options[LOWER_BOUND])
    except (KeyError, TypeError, ValueError):
        return None


def bound_name(method_options: Mapping[str, Any]) -> str:
    """Return the bound in short, with fraction and slack of its rule; `default` where none is set."""
    number = fixed_bound(method_options)
    if number is not None:
        return f"{number:g}"
    words = [str(method_options.get(LOWER_BOUND, "default"))]
    if FRACTION in method_options:
        words.append(str(method_options[FRACTION]))
    if SLACK in method_options:
        words.append(f"slack {method_options[SLACK]:g}")
    return " ".join(words)


def bound_order(method_options: Mapping[str, Any]) -> tuple[int, float, float, str]:
    """Sort numbers first, then the rules, each by its fraction and slack."""
    number, rule = fixed_bound(method_options), method_options.get(LOWER_BOUND)
    if number is not None:
        return 0, number, 0.0, ""
    place = 1 + RULES.index(rule) if rule in RULES else 1 + len(RULES)
    fraction, slack = (float(method_options.get(name) or 0.0) for name in (FRACTION, SLACK))
    return place, fraction, slack, str(rule)


def in_words(method_options: Mapping[str, Any]) -> list[str]:
    """Return the options of a method as a label has them, the lower bound in short."""
    return [f"F* {bound_name(method_options)}"] * (LOWER_BOUND in method_options) + others(method_options)


def others(method_options: Mapping[str, Any]) -> list[str]:
    """Return the options that do not say the lower bound."""
    told = (LOWER_BOUND, FRACTION, SLACK) if LOWER_BOUND in method_options else ()
    return [f"{key}={as_text(value)}" for key, value in method_options.items() if key not in told]
