"""Runs any script or module with the methods registered.

python -m hf_noneuclid script.py --optim muonmax_momo ...
accelerate launch -m hf_noneuclid script.py --optim muonmax_momo ...
accelerate launch -m hf_noneuclid -m some.module --optim muonmax_momo ...
"""

from __future__ import annotations

import os
import runpy
import sys

from .log import show_log

USAGE = "usage: python -m hf_noneuclid (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main() -> None:
    """Runs the script or module that the command line names, with the arguments that follow it."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        stream, code = (sys.stdout, 0) if arguments[:1] in (["-h"], ["--help"]) else (sys.stderr, 2)
        print(
            f"{USAGE}\n\nRuns it unchanged, with the methods of hf_noneuclid known to --optim.", file=stream
        )
        sys.exit(code)
    _register()
    show_log()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.isfile(script):
        sys.exit(f"hf_noneuclid: there is no script {script!r}.\n{USAGE}")
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _register() -> None:
    from . import register

    try:
        register()
    except ImportError as error:
        sys.exit(f"hf_noneuclid: {error}")


if __name__ == "__main__":
    main()
