"""Whether what a suite names exists: methods, their options, flags of the recipe. Imports take seconds."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from hf_noneuclid.experiments.common import InputError, option_pairs
from hf_noneuclid.experiments.finetuning import finetune_options
from hf_noneuclid.experiments.finetuning.finetune_options import DEFAULT_MODEL
from hf_noneuclid.experiments.sweeping.execution import FOLDER, as_arguments, recipe_flags
from hf_noneuclid.experiments.sweeping.suite import Suite
from hf_noneuclid.experiments.training import options
from hf_noneuclid.methods import FREE_METHOD, METHODS, all_names, parse_options, resolve

FILES = ("train_files", "validation_files", "old_domain_files")
ARGUMENT_TYPES = {"pretrain": options.ARGUMENT_TYPES, "finetune": finetune_options.ARGUMENT_TYPES}


def check_suite(suite: Suite, processes: int) -> None:
    """Check every run of a suite before the first one starts.

    Args:
        suite: what the user asks for.
        processes: of a run.

    Raises:
        InputError: the recipe, a method, an option or a file is unknown, or a value of the wrong kind.
    """
    script = FOLDER / f"{suite.recipe}.py"
    parser = _Parser(ARGUMENT_TYPES[suite.recipe], prog=script.name, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    for run in suite.runs():
        where = f"suite {suite.name}, {run.label}"
        flags = recipe_flags(suite, run, processes)
        _check_names(flags, known, where, script)
        _check_method(run.method, flags.get("optim_args") or "", where)
        try:
            parser.parse_args(as_arguments(flags))
        except _UsageError as error:
            raise InputError(f"{where}: {error}") from error
    _check_files(suite.options)


def check_model(suite: Suite) -> None:
    """Check that the model that a suite of fine-tuning starts from is there, if it is a local one.

    Raises:
        InputError: it has to be trained first.
    """
    named = any(suite.options.get(name) for name in ("model_name_or_path", "model_package"))
    if suite.recipe == "finetune" and not named and not (Path(DEFAULT_MODEL) / "config.json").is_file():
        raise InputError(
            f"the suite starts from {DEFAULT_MODEL}, which is not there: run recipes/pretrain.py first, "
            "or name another with --option model_name_or_path=..."
        )


class _UsageError(ValueError):
    """What argparse says of a command line."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def _check_names(flags: Mapping[str, Any], known: set[str], where: str, script: Path) -> None:
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"similar ones are {', '.join(near)}; " if near else ""
            raise InputError(
                f"{where}: {script.name} has no option {name!r}; {hint}{script.name} --help lists the known"
            )


def _check_method(method: str, text: str, where: str) -> None:
    if method not in all_names():
        others = [item.value for item in OptimizerNames if item.value not in all_names()]
        if method not in others:
            raise InputError(
                f"{where}: unknown method {method!r}; known are {', '.join([*METHODS, FREE_METHOD])}, "
                f"and the Trainer's {', '.join(others)}"
            )
        return  # its options are its own
    try:
        resolve(method, **parse_options(option_pairs(text)))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _check_files(options: Mapping[str, Any]) -> None:
    for name in FILES:
        value = options.get(name) or []
        for path in value if isinstance(value, list) else [value]:
            if not Path(path).is_file():
                raise InputError(f"{name}: there is no file {path}")
