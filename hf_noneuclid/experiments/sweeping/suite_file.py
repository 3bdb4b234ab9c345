"""The form of a suite file: which keys there are, and what stands under them."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_noneuclid.experiments.common import InputError, require
from hf_noneuclid.experiments.secrets import holds_secret

RECIPES = ("pretrain", "finetune", "classify", "digits")
PEERS = ("prodigy", "momo_adam")  # methods of suites that a recipe takes as --peer, not as --optim
REQUIRED_KEYS = ("about", "recipe", "grid")
MERGED_KEYS = ("options", "per_method", "report")  # of a task: added to those of the file
TASK_KEYS = (*REQUIRED_KEYS, *MERGED_KEYS, "start", "learning_rate")
KEYS = (*REQUIRED_KEYS, *MERGED_KEYS, "seeds", "more_seeds", "more_rates", "launch", "start", "tasks")
BLOCK_KEYS = ("method", "learning_rate", "method_options", "options", "flags", "more_seeds", "column")
MORE_SEEDS = {"seeds": [], "within_decades": 1.0}
LAUNCH = {"processes": None, "accelerate_config": None, "threads": 1}
# The sweep sets these flags for every run.
OF_FOLDER = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
RESERVED = ("optim", "learning_rate", "seed", "config", *OF_FOLDER)
REQUIRED = "REQUIRED"  # an option with this value must be given on the command line


def read_suites(path: Path, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Reads the values of a suite by its name, or those of every task of a file that has tasks.

    Args:
        path: The YAML file.
        overrides: Replace entries of ``options``.

    Returns:
        Names, ``file/task`` for a task, and values with the defaults of what is left out.

    Raises:
        InputError: The file cannot be read, a key is unknown or missing, or a value is of the wrong type.
    """
    where = f"suite {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: {error}") from error
    given = _mapping(content, where, KEYS)
    tasks = _mapping(given.pop("tasks", None), f"{where}, tasks")
    if not tasks:
        return {path.stem: _read_suite(given, overrides, where)}
    found = {}
    for place, (name, task) in enumerate(tasks.items()):
        inside = f"{where}, task {name}"
        values = _read_suite(_of_task(given, task, inside), overrides, inside)
        found[f"{path.stem}/{name}"] = {**values, "report": {**values["report"], "place": place}}
    return found


def _of_task(common: Mapping[str, Any], task: Any, where: str) -> dict[str, Any]:
    """What the file says of a task: its own keys, and those of all tasks.

    A block of the grid without learning rates takes those that the task has for each method.
    """
    own = _mapping(task, where, TASK_KEYS)
    rates = _mapping(own.pop("learning_rate", None), f"{where}, learning_rate")
    merged = {key: {**(common.get(key) or {}), **_mapping(own.get(key), where)} for key in MERGED_KEYS}
    values = {**common, **own, **merged}
    grid = []
    for block in map(dict, _list(values.get("grid"))):
        if "learning_rate" in block:
            grid.append(block)
            continue
        for method in _list(block.get("method")):
            require(method in rates, f"{where}: learning_rate lacks {method}, a method of the grid")
            grid.append({**block, "method": [method], "learning_rate": rates[method]})
    return {**values, "grid": grid}


def _read_suite(given: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in REQUIRED_KEYS:
        require(given.get(key), f"{where}: {key} is missing or empty")
    recipe = given["recipe"]
    require(recipe in RECIPES, f"{where}: unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
    read = [_block(block, f"{where}, grid block {i}") for i, block in enumerate(_list(given["grid"]), 1)]
    grid = [part for block in read for part in _by_column(block)]
    methods = sorted({method for block in grid for method in block["method"]})
    per_method = _mapping(given.get("per_method"), f"{where}, per_method")
    for method in per_method:
        require(method in methods, f"{where}: {method} is not in the grid; it has {', '.join(methods)}")
    return {
        "about": str(given["about"]).strip(),
        "recipe": recipe,
        "options": _flags({**_mapping(given.get("options"), where), **overrides}, f"{where}, options"),
        "grid": grid,
        "per_method": {m: _flags(_mapping(flags, where), f"{where}, {m}") for m, flags in per_method.items()},
        "seeds": _integers(given.get("seeds") or [0], f"{where}, seeds"),
        "more_seeds": _more_seeds(given.get("more_seeds"), f"{where}, more_seeds"),
        "more_rates": _count(given.get("more_rates", 0), f"{where}, more_rates"),
        "start": _flags(_mapping(given.get("start"), f"{where}, start"), f"{where}, start", RESERVED[3:]),
        "launch": _launch(given.get("launch"), f"{where}, launch"),
        "report": _mapping(given.get("report"), f"{where}, report"),
    }


def _block(content: Any, where: str) -> dict[str, Any]:
    block = _mapping(content, where, BLOCK_KEYS)
    lists = {name: _list(block.get(name)) for name in ("method", "learning_rate")}
    options = {
        name: {key: _list(value) for key, value in _mapping(block.get(name), where).items()}
        for name in ("method_options", "options")
    }
    for name, values in [*lists.items(), *options["method_options"].items(), *options["options"].items()]:
        require(values, f"{where}: {name} is missing or empty, so there is nothing to run")
    rates = [_positive(rate, f"{where}, learning_rate") for rate in lists["learning_rate"]]
    _flags(options["options"], where)
    more = {"flags": _flags(_mapping(block.get("flags"), where), where)} if "flags" in block else {}
    more |= {key: block[key] for key in ("more_seeds", "column") if key in block}
    return {"method": [str(name) for name in lists["method"]], "learning_rate": rates, **options, **more}


def _by_column(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The block itself, or where ``column`` names an option, a block for each value, which is its column."""
    for kind in ("method_options", "options"):
        if values := block[kind].get(block.get("column")):
            name = block["column"]
            parts = [(str(value), {**block[kind], name: [_as_number(value)]}) for value in values]
            return [{**block, "column": column, kind: options} for column, options in parts]
    return [block]


def _as_number(value: Any) -> Any:
    """The number that a text stands for: YAML reads 1e-3 as a text, which is good as the name of a column."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _flags(flags: Mapping[str, Any], where: str, reserved: Iterable[str] = RESERVED) -> dict[str, Any]:
    for key, value in flags.items():
        require(key not in reserved, f"{where}: {key} is set by the sweep for every run; leave it out")
        require(value != REQUIRED, f"{where}: {key} must be given: --option {key}=...")
        require(
            not holds_secret(key, value),
            f"{where}: {key} holds a secret, and everyone who reads the study could read it. Leave it out, "
            "and set HF_TOKEN in the environment of the sweep instead",
        )
    return dict(flags)


def _more_seeds(content: Any, where: str) -> dict[str, Any]:
    values = {**MORE_SEEDS, **_mapping(content, where, MORE_SEEDS)}
    decades = values["within_decades"]
    is_distance = isinstance(decades, int | float) and decades >= 0
    require(is_distance, f"{where}: within_decades must be a number of at least 0, not {decades!r}")
    return {"seeds": _integers(values["seeds"], where), "within_decades": decades}


def _launch(content: Any, where: str) -> dict[str, Any]:
    values = {**LAUNCH, **_mapping(content, where, LAUNCH)}
    for key in ("processes", "threads"):
        is_count = values[key] is None or (type(values[key]) is int and values[key] > 0)
        require(is_count, f"{where}: {key} must be an integer of at least 1, not {values[key]!r}")
    return values


def _mapping(content: Any, where: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    is_mapping = isinstance(content, dict | None)
    require(is_mapping, f"{where}: expected `key: value` lines, found {content!r}")
    given = {str(key): value for key, value in (content or {}).items()}
    for key in given:
        is_known = known is None or key in known
        require(is_known, f"{where}: unknown key {key!r}; known are {', '.join(known or ())}")
    return given


def _list(content: Any) -> list[Any]:
    """The values of a list; a single value is a list of one."""
    return content if isinstance(content, list) else [] if content is None else [content]


def _integers(content: Any, where: str) -> list[int]:
    values = _list(content)
    are_integers = all(type(value) is int for value in values)
    require(are_integers, f"{where}: expected a list of integers, found {content!r}")
    return values


def _count(value: Any, where: str) -> int:
    is_count = type(value) is int and value >= 0
    require(is_count, f"{where}: expected an integer of at least 0, found {value!r}")
    return int(value)


def _positive(value: Any, where: str) -> float:
    """The value as a number. YAML reads 1e-3 as a string."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    require(0 < number < math.inf, f"{where}: expected a number above 0, found {value!r}")
    return number
