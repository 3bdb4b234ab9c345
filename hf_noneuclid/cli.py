"""The command ``noneuclid``, also ``python -m hf_noneuclid``.

    noneuclid run script.py --optim muonmax_momo ...
    noneuclid run -m some.module --optim muonmax_momo ...
    noneuclid sweep --suite mini --dry_run
    accelerate launch -m hf_noneuclid script.py --optim muonmax_momo ...

``run`` may be left out before a script or ``-m``.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "run any script or module, with the methods known to --optim",
    "sweep": "run a suite: every method at every learning rate",
    "report": "report a sweep: tables and figures",
    "plan": "predict memory and communication of a run that cannot be tried",
    "benchmark": "time an optimizer step against other optimizers",
    "publish": "push a trained model or a study to the Hub",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; ``argv`` is by default the command line of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _usage(2 if not arguments else 0)
    command = arguments[0]
    if command == "run":
        run(arguments[1:])
    elif command in COMMANDS and not os.path.exists(command):
        sys.argv[0] = f"noneuclid {command}"
        importlib.import_module(f"hf_noneuclid.experiments.{command}").main(arguments[1:])
    else:
        run(arguments)


def run(arguments: Sequence[str]) -> None:
    """Runs a script, or with ``-m`` a module, as if it had been started alone."""
    from . import register
    from .log import show_log

    if not arguments or arguments[0] in ("-h", "--help") or list(arguments) == ["-m"]:
        _usage(0 if arguments and arguments[0] != "-m" else 2)
    try:
        register()
    except ImportError as error:
        sys.exit(f"noneuclid: {error}")
    show_log()
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.isfile(script):
        sys.exit(f"noneuclid: there is no script and no command {script!r}. See noneuclid --help.")
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _usage(code: int) -> None:
    lines = [f"  {name:<11}{words}" for name, words in COMMANDS.items()]
    usage = (
        "usage: noneuclid COMMAND [ARGUMENT ...]\n       noneuclid [run] (SCRIPT | -m MODULE) [ARGUMENT ...]"
    )
    print("\n".join([usage, "", *lines]), file=sys.stderr if code else sys.stdout)
    sys.exit(code)
