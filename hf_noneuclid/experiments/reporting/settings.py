"""Settings: the options of the recipe by which runs differ, and are not comparable; and their short names."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_noneuclid.experiments.sweeping.suite import as_text

NOTHING_OF_ITS_OWN = "common options"
PREFIX = "per_device_train_"  # of an option, too long for a title


def setting_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each of several different settings, empty where there is but one.

    A value that is itself a list of pairs, as n_layer=4,n_embd=128, stands without the name of its option and
    without the pairs that all settings have.
    """
    if len(settings) < 2:
        return [""] * len(settings)
    shared = {key: _shared([options.get(key) for options in settings]) for key in settings[0]}
    names = [_name(options, shared) for options in settings]
    return names if len(set(names)) == len(names) else [_name(options, {}) for options in settings]


def _name(options: Mapping[str, Any], shared: Mapping[str, set[str]]) -> str:
    words: list[str] = []
    for key, value in sorted(options.items(), key=lambda item: item[0].removeprefix(PREFIX)):
        own = [pair for pair in _pairs(value) if pair not in shared.get(key, ())]
        words += own if _pairs(value) else [f"{key.removeprefix(PREFIX)}={as_text(value)}"]
    return ", ".join(words) or NOTHING_OF_ITS_OWN


def _shared(values: Sequence[Any]) -> set[str]:
    return set.intersection(*(set(_pairs(value)) for value in values))


def _pairs(value: Any) -> list[str]:
    """Return the pairs of a value such as n_layer=4,n_embd=128; none if it is not of that kind."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    return parts if all("=" in part for part in parts) else []
