"""The command ``noneuclid``; ``python -m hf_noneuclid`` is the same.

    noneuclid run script.py --optim muonmax_momo ...
    noneuclid run -m some.module --optim muonmax_momo ...
    noneuclid sweep --suite mini --dry_run
    accelerate launch -m hf_noneuclid script.py --optim muonmax_momo ...

``run`` may be left out, unless the script has the name of a command.
"""

from __future__ import annotations

import difflib
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from . import __version__, register
from .log import show_log

COMMANDS = {
    "run": "run any training script or module, unchanged, with the methods as values of --optim",
    "sweep": "run a suite: every method at every learning rate",
    "report": "report a sweep in tables and figures",
    "routes": "show which parameters of a model or script are matrices",
    "plan": "predict the memory and communication of a run that you cannot try",
    "benchmark": "time an optimizer step against other optimizers",
    "publish": "push a trained model or a study to the Hugging Face Hub",
}
RUN = "noneuclid [run] (SCRIPT | -m MODULE) [ARGUMENT ...]"
RUN_HELP = f"usage: {RUN}\n\nRuns a training script or module, with the methods as values of --optim."
LINES = "\n".join(f"  {name:<11}{words}" for name, words in COMMANDS.items())
HELP = f"""usage: noneuclid (COMMAND | --help | --version) [ARGUMENT ...]
       {RUN}

{LINES}

`noneuclid COMMAND --help` lists the arguments of a command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exits with 2 and a message if the command line is wrong or a package is missing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        _stop(HELP)
    first, *rest = arguments
    if first in ("-h", "--help"):
        print(HELP)
    elif first == "--version":
        print(f"noneuclid {__version__}")
    elif first == "run":
        run(rest)
    elif first in COMMANDS:
        _run_command(first, rest)
    elif first == "-m" or first.endswith(".py") or os.path.exists(first):
        run(arguments)
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"The commands are {', '.join(COMMANDS)}."
        _stop(f"noneuclid: there is no command and no script {first!r}. {hint}")


def run(arguments: Sequence[str]) -> None:
    """Runs a script, or with ``-m`` a module, as Python itself would, after registering the methods."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(RUN_HELP)
        return
    if not arguments or list(arguments) == ["-m"]:
        _stop(RUN_HELP)
    try:
        register()  # importing the package has tried it, and only warned
    except ImportError as error:
        _stop(f"noneuclid: {error}")
    if arguments[0] == "-m":
        _run_module(list(arguments[1:]))
    else:
        _run_script(list(arguments))


def _run_module(argv: list[str]) -> None:
    sys.argv = argv
    sys.path.insert(0, os.getcwd())
    if not _is_runnable(argv[0]):
        _stop(f"noneuclid: there is no module {argv[0]!r} that can be run. See noneuclid --help.")
    show_log()
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _is_runnable(name: str) -> bool:
    """Whether ``python -m`` finds a module. It imports the parent packages, whose own errors are raised."""
    if name.startswith("."):
        return False
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        return False
    return spec is not None


def _run_script(argv: list[str]) -> None:
    if not os.path.isfile(argv[0]):
        _stop(f"noneuclid: there is no script {argv[0]!r}. See noneuclid --help.")
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    show_log()
    runpy.run_path(argv[0], run_name="__main__")


def _run_command(name: str, arguments: Sequence[str]) -> None:
    try:
        importlib.import_module(f"hf_noneuclid.experiments.{name}").main(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "hf_noneuclid"):
            raise
        _stop(f"noneuclid {name} needs the package {package}: pip install 'hf_noneuclid[recipes]'")


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)
