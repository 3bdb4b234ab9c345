"""The options of the recipes: the defaults, then the file of ``--config``, then the command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_noneuclid.experiments.common import ExitCode
from hf_noneuclid.experiments.secrets import holds_secret, redact_arguments, scrub
from hf_noneuclid.experiments.training.arguments import (
    DEFAULT_MODEL,
    ClassifyDataArguments,
    DataArguments,
    FinetuneDataArguments,
    ModelArguments,
    PretrainedArguments,
)
from hf_noneuclid.experiments.training.trainer_arguments import (
    ClassifyArguments,
    FinetuneArguments,
    PretrainArguments,
    RecipeArguments,
)

__all__ = [
    "ARGUMENT_TYPES",
    "DEFAULT_MODEL",
    "DataArguments",
    "ModelArguments",
    "RecipeArguments",
    "describe_call",
    "given",
    "parse",
    "read_config",
]

ARGUMENT_TYPES: dict[str, tuple[type, type, type]] = {
    "pretrain": (ModelArguments, DataArguments, PretrainArguments),
    "finetune": (PretrainedArguments, FinetuneDataArguments, FinetuneArguments),
    "classify": (PretrainedArguments, ClassifyDataArguments, ClassifyArguments),
}
"""The arguments of each recipe: of the model, of the data, and of the Trainer."""


class _Parser(HfArgumentParser):
    """The Trainer's usage text has several pages, so an error is printed without it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {scrub(message)} (--help lists every option)", file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT)


def _parser(types: Sequence[type]) -> _Parser:
    parser = _Parser(types, prog=Path(sys.argv[0]).name, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Defaults that the command line overrides.")
    return parser


def parse(argv: Sequence[str], types: Sequence[type]) -> tuple[Any, ...]:
    """Parses a command line, on top of the YAML file that it may name with ``--config``.

    Args:
        argv: The command line.
        types: Dataclasses, such as those of ``ARGUMENT_TYPES``.

    Returns:
        An instance of each type.

    Raises:
        SystemExit: An option is unknown, or its value cannot be used; the message says which.
    """
    parser = _parser(types)
    config = read_config(argv, parser)
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*_as_arguments(config, parser), *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # the Trainer's own checks of its arguments
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return tuple(parsed)


def given(argv: Sequence[str], types: Sequence[type], known: Sequence[type]) -> dict[str, Any]:
    """The options that a command line and its config file give, without secrets.

    Args:
        argv: A command line that ``parse`` accepts.
        types: Its dataclasses.
        known: The dataclasses of another recipe; options that it does not have are left out.
    """
    parser, names = _parser(types), {item.name for kind in known for item in fields(kind)}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    values = {**read_config(argv, parser), **vars(parser.parse_args(list(argv)))}
    return {name: value for name, value in values.items() if name in names and not holds_secret(name, value)}


def read_config(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """What the YAML file of ``--config`` holds; empty without one."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return {}
    parser = parser or finder
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected `option: value` lines, found a {type(values).__name__}")
    return values


def _as_arguments(config: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Writes YAML values as command-line arguments, so that they are checked in the same way."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    unknown = sorted(str(key) for key in config if key not in actions)
    if unknown:
        parser.error(f"unknown keys in the --config file: {', '.join(unknown)}")
    arguments: list[str] = []
    for key, value in config.items():
        if isinstance(value, list) and actions[key].nargs == "+":
            arguments += [f"--{key}", *map(str, value)]
        elif isinstance(value, list):  # a list of lists has no form on the command line
            parser.set_defaults(**{key: value})
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
            arguments.append(f"--{key}={text}")
    return arguments


def describe_call(recipe: str, argv: Sequence[str]) -> dict[str, Any]:
    """How a recipe was called, for metrics.json, without any secret."""
    return {"recipe": recipe, "command": redact_arguments(argv), "config": scrub(read_config(argv))}
