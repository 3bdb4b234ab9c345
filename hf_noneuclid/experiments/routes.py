"""Shows which parameters of a model or of a script are matrices.

    noneuclid routes gpt2
    noneuclid routes train.py --optim muonmax_momo ...

A script runs until it makes an optimizer of hf_noneuclid, and does not train then; without one it runs to
its end.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import NoReturn

import torch

from hf_noneuclid.cli import run
from hf_noneuclid.experiments.costs.models import MODELS, build, load_config
from hf_noneuclid.routing import RoutingTable, route_parameters


class _Stop(logging.Handler):
    """Ends the process where an optimizer is made, which logs its table."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and record.args and isinstance(record.args[0], RoutingTable):
            print(record.args[0], flush=True)
            raise SystemExit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; ``argv`` is by default the command line of the process."""
    parser = argparse.ArgumentParser(prog="noneuclid routes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model",
        help=f"a script, or, as a causal language model, {', '.join(MODELS)}, a folder, a config.json, or an "
        "id of the Hub",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args(argv)
    if args.model.endswith(".py"):
        _show_of_script([args.model, *args.arguments])
    try:
        if args.arguments:
            raise ValueError(f"arguments are for a script, not for a model: {' '.join(args.arguments)}")
        print(route_parameters(build(load_config(args.model), torch.device("meta")))[1])
    except ValueError as error:
        parser.error(str(error))


def _show_of_script(command: list[str]) -> NoReturn:
    maker = logging.getLogger("hf_noneuclid.methods")
    maker.addHandler(_Stop())
    maker.setLevel(logging.DEBUG)
    run(command)
    raise SystemExit("noneuclid routes: the script ended and had made no optimizer of hf_noneuclid.")
