"""Lower bounds F* by their short names: 0, 3.5, star, relative 0.7, auto 0.7."""

from collections.abc import Mapping
from typing import Any

from sweeping.suite import as_text

LOWER_BOUND, FRACTION = "loss_lower_bound", "lower_bound_fraction"
RULES = ("star", "relative", "auto")


def fixed_bound(method_options: Mapping[str, Any]) -> float | None:
    """Return the bound if it is a number."""
    try:
        return float(method_options[LOWER_BOUND])
    except (KeyError, TypeError, ValueError):
        return None


def bound_name(method_options: Mapping[str, Any]) -> str:
    """Return the bound in short, with the fraction of its rule; `default` where the runs do not set it."""
    number = fixed_bound(method_options)
    if number is not None:
        return f"{number:g}"
    words = [str(method_options.get(LOWER_BOUND, "default")), method_options.get(FRACTION)]
    return " ".join(str(word) for word in words if word is not None)


def bound_order(method_options: Mapping[str, Any]) -> tuple[int, float, str]:
    """Sort numbers first, then the rules, each by its fraction."""
    number, rule = fixed_bound(method_options), method_options.get(LOWER_BOUND)
    if number is not None:
        return 0, number, ""
    place = 1 + RULES.index(rule) if rule in RULES else 1 + len(RULES)
    return place, float(method_options.get(FRACTION) or 0.0), str(rule)


def in_words(method_options: Mapping[str, Any]) -> list[str]:
    """Return the options of a method as a label has them, the lower bound in short."""
    return [f"F* {bound_name(method_options)}"] * (LOWER_BOUND in method_options) + others(method_options)


def others(method_options: Mapping[str, Any]) -> list[str]:
    """Return the options that do not say the lower bound."""
    told = (LOWER_BOUND, FRACTION) if LOWER_BOUND in method_options else ()
    return [f"{key}={as_text(value)}" for key, value in method_options.items() if key not in told]
