"""The form of a suite file: which keys there are, and what stands under them.

Everything here turns plain YAML values into plain values of one form, or says what is wrong with them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.secrets import holds_secret

Scalar = str | int | float | bool | None

RECIPES = ("pretrain", "finetune")
KEYS = (
    *("about", "recipe", "options", "grid", "per_method", "seeds", "more_seeds", "launch", "report"),
    "hours",
)
BLOCK_KEYS = ("method", "learning_rate", "method_options", "options")
MORE_SEEDS = {"seeds": [], "within_decades": 1.0}
LAUNCH = {"processes": None, "accelerate_config": None, "threads": 1}
# The sweep gives these to every run by itself.
RESERVED = (
    *("optim", "learning_rate", "seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    "config",
)
REQUIRED = "REQUIRED"  # an option with this value must be given on the command line


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        InputError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"suite {path}: {error}") from error


def normalise(content: Any, where: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a suite in one form, with the defaults of what is left out.

    Args:
        content: of the file.
        where: names the file in messages.
        overrides: replace entries of `options`.

    Raises:
        InputError: a key is unknown or missing, or a value is of the wrong kind.
    """
    where = f"suite {where}"
    given = _mapping(content, where)
    _check_keys(given, KEYS, where)
    for key in ("about", "recipe", "grid"):
        if not given.get(key):
            raise InputError(f"{where}: {key} is missing or empty")
    if given["recipe"] not in RECIPES:
        raise InputError(f"{where}: unknown recipe {given['recipe']!r}; known are {', '.join(RECIPES)}")
    grid = [
        _block(block, f"{where}, grid block {i}") for i, block in enumerate(_list(given["grid"]), start=1)
    ]
    methods = {method for block in grid for method in block["method"]}
    return {
        "about": str(given["about"]).strip(),
        "recipe": given["recipe"],
        "options": _flags({**_mapping(given.get("options"), where), **overrides}, f"{where}, options"),
        "grid": grid,
        "per_method": _per_method(given.get("per_method"), methods, where),
        "seeds": _integers(given.get("seeds", [0]), f"{where}, seeds"),
        "more_seeds": _more_seeds(given.get("more_seeds"), where),
        "launch": _launch(given.get("launch"), where),
        "report": _mapping(given.get("report"), f"{where}, report"),
        "hours": _hours(given.get("hours"), where),
    }


def _block(block: Any, where: str) -> dict[str, Any]:
    block = _mapping(block, where)
    _check_keys(block, BLOCK_KEYS, where)
    method = _list(block.get("method"))
    rates = _list(block.get("learning_rate"))
    for name, values in (("method", method), ("learning_rate", rates)):
        if not values:
            raise InputError(f"{where}: {name} is missing or empty, so there is nothing to run")
    return {
        "method": [str(name) for name in method],
        "learning_rate": [_positive(rate, f"{where}, learning_rate") for rate in rates],
        "method_options": _lists(block.get("method_options"), f"{where}, method_options"),
        "options": _lists(_flags(_mapping(block.get("options"), where), where), f"{where}, options"),
    }


def _lists(content: Any, where: str) -> dict[str, list[Any]]:
    lists = {str(key): _list(value) for key, value in _mapping(content, where).items()}
    for key, values in lists.items():
        if not values:
            raise InputError(f"{where}: {key} has no values, so there is nothing to run")
    return lists


def _flags(flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in flags:
        if key in RESERVED:
            raise InputError(f"{where}: {key} is set by the sweep for every run; leave it out")
        if flags[key] == REQUIRED:
            raise InputError(f"{where}: {key} must be given: --option {key}=...")
        if holds_secret(str(key), flags[key]):
            raise InputError(
                f"{where}: {key} holds a secret, which the study would keep for all to read: leave it out, "
                "and set HF_TOKEN in the environment of sweep.py instead"
            )
    return {str(key): value for key, value in flags.items()}


def _per_method(content: Any, methods: Iterable[str], where: str) -> dict[str, dict[str, Any]]:
    where = f"{where}, per_method"
    given = _mapping(content, where)
    for method in given:
        if method not in methods:
            raise InputError(f"{where}: {method} is not in the grid; it has {', '.join(sorted(methods))}")
    return {method: _flags(_mapping(flags, where), f"{where}, {method}") for method, flags in given.items()}


def _more_seeds(content: Any, where: str) -> dict[str, Any]:
    where = f"{where}, more_seeds"
    given = _mapping(content, where)
    _check_keys(given, MORE_SEEDS, where)
    values = {**MORE_SEEDS, **given}
    seeds = _integers(values["seeds"], where) if values["seeds"] else []
    decades = _number(values["within_decades"], lambda x: x >= 0, f"{where}, within_decades", "not negative")
    return {"seeds": seeds, "within_decades": decades}


def _launch(content: Any, where: str) -> dict[str, Any]:
    where = f"{where}, launch"
    given = _mapping(content, where)
    _check_keys(given, LAUNCH, where)
    values = {**LAUNCH, **given}
    for key in ("processes", "threads"):
        if values[key] is not None and (not _is_integer(values[key]) or values[key] < 1):
            raise InputError(f"{where}: {key} must be an integer of at least 1, not {values[key]!r}")
    return values


def _hours(value: Any, where: str) -> float | None:
    return None if value is None else _positive(value, f"{where}, hours")


def _check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected `key: value` lines, found {content!r}")
    return content


def _list(content: Any) -> list[Any]:
    """Return the values of a list; one value is a list of one."""
    return content if isinstance(content, list) else [] if content is None else [content]


def _integers(content: Any, where: str) -> list[int]:
    values = _list(content)
    if not values or not all(map(_is_integer, values)):
        raise InputError(f"{where}: expected a list of integers, found {content!r}")
    return values


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any, where: str) -> float:
    return _number(value, lambda x: x > 0, where, "above 0")


def _number(value: Any, holds: Callable[[float], bool], where: str, words: str) -> float:
    """Return a number; YAML reads 1e-3 as a string."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not holds(number):
        raise InputError(f"{where}: expected a number {words}, found {value!r}")
    return number
