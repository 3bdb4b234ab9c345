"""Whether what a suite names exists: methods, their options, flags of the recipe, the model."""

import difflib
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path

from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from hf_noneuclid.experiments.common import InputError, option_pairs, require
from hf_noneuclid.experiments.sweeping.commands import as_arguments, recipe_flags
from hf_noneuclid.experiments.sweeping.suite import Suite
from hf_noneuclid.experiments.sweeping.suite_file import PEERS
from hf_noneuclid.experiments.training import options
from hf_noneuclid.methods import FREE_METHOD, METHODS, all_names, parse_options, resolve

PACKAGES = {"prodigy": "prodigyopt", "momo_adam": "momo", "schedule_free_adamw": "schedulefree"}
FILES = ("train_files", "validation_files", "old_domain_files")


def check_suite(suite: Suite, processes: int) -> None:
    """Checks every run of a suite before the first one starts.

    Raises:
        InputError: A method, an option or a file is unknown, or a value is of the wrong type.
    """
    script, parser = f"{suite.recipe}.py", parser_of(suite.recipe)
    known = {action.dest for action in parser._actions}
    for run in suite.runs():
        where = f"suite {suite.name}, {run.label}"
        flags = recipe_flags(suite, run, processes)
        for name in flags:
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f"similar ones are {', '.join(near)}; " if near else ""
                raise InputError(f"{where}: {script} has no option {name!r}; {hint}see {script} --help_all")
        _check_method(run.method, flags.get("optim_args") or "", where)
        try:
            parser.parse_args(as_arguments(flags))
        except ArgumentError as error:
            raise InputError(f"{where}: {error}") from error
    for name in FILES:
        paths = suite.options.get(name) or []
        for path in paths if isinstance(paths, list) else [paths]:
            require(Path(path).is_file(), f"{name}: there is no file {path}")


def check_model(suite: Suite) -> None:
    """Checks that the packages of peers, and the default model if fine-tuning starts from it, are there.

    Raises:
        InputError: One is not.
    """
    for method, package in PACKAGES.items():
        used = any(method in block["method"] for block in suite.grid)
        lacks = f"{method} needs the package {package}: pip install 'hf_noneuclid[peers]'"
        require(not used or find_spec(package), lacks)
    named = any(suite.options.get(name) for name in ("model_name_or_path", "model_package"))
    model = Path(options.DEFAULT_MODEL)
    if suite.recipe in ("finetune", "classify") and not named and not (model / "config.json").is_file():
        raise InputError(
            f"the suite starts from {model}, which is not there: run recipes/pretrain.py first, or name "
            "another model with --option model_name_or_path=..."
        )


def parser_of(recipe: str) -> HfArgumentParser:
    """The parser of a recipe's command line; it raises ArgumentError for a value that it cannot read."""
    return HfArgumentParser(options.ARGUMENT_TYPES[recipe], allow_abbrev=False, exit_on_error=False)


def _check_method(method: str, text: str, where: str) -> None:
    if method in all_names():
        try:
            resolve(method, **parse_options(option_pairs(text)))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        return
    others = [*PEERS] + [item.value for item in OptimizerNames if item.value not in all_names()]
    known = f"{', '.join([*METHODS, FREE_METHOD])}, and of others {', '.join(others)}"
    require(method in others, f"{where}: unknown method {method!r}; known are {known}")
