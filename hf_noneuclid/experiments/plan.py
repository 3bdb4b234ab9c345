"""Plans a run that cannot be tried: memory, communication and polar factors of each GPU.

    noneuclid plan --model llama-7b --gpus 8 64 1024
    torchrun --nproc_per_node=2 -m hf_noneuclid plan --measure --engine fsdp2 zero3

The first reads nothing but a configuration. It prints, for each engine and number of GPUs, what a GPU holds,
sends and computes in one optimizer step. The second takes three steps with each engine on the processes that
it is started with. It prints the bytes that were sent in a step and kept by the optimizer, and those that are
predicted: a JSON object for each engine and rank.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from hf_noneuclid.experiments.costs import tables
from hf_noneuclid.experiments.costs.engines import DTYPES, ENGINES, grid_of
from hf_noneuclid.experiments.costs.models import MODELS, build, load_config
from hf_noneuclid.experiments.costs.step import Costs, elements, plan_row, shapes_of, units
from hf_noneuclid.options import NUCLEAR_NORMS


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan, or the measurements; ``argv`` is by default the command line of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    try:
        if args.measure:
            _measure(args)
        else:
            report = predict(args)
            print(json.dumps(report) if args.json else tables.plan_text(report))
    except ValueError as error:
        parser.error(str(error))


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the model, and a row for each engine and number of GPUs.

    Raises:
        ValueError: There is no such model or method, or an engine does not fit the number of GPUs.
    """
    model = build(load_config(args.model), torch.device("meta"))
    shapes = shapes_of(model, args.optim, nuclear_norm=args.nuclear_norm)
    rows = []
    for engine in args.engine:
        for gpus in args.gpus:
            costs = Costs(shapes, engine, grid_of(engine, gpus, args.gpus_per_node))
            rows.append(plan_row(costs, args.dtype))
    return {
        **{key: getattr(args, key) for key in ("model", "optim", "nuclear_norm", "dtype")},
        "parameters": elements(shapes.parameters),
        "matrix_elements": elements(shapes.matrices),
        "second_moment_elements": elements(shapes.adaptive),
        "matrices": units(shapes.matrices),
        "units": units(shapes.parameters),
        "rows": rows,
    }


def _measure(args: argparse.Namespace) -> None:
    from hf_noneuclid.experiments.costs.measured import measure  # slow, with the engines

    config = load_config(args.model)
    for row in measure(config, args.engine, args.optim, args.nuclear_norm, args.gpus_per_node):
        print(json.dumps(row))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # CPU workers sometimes abort while the interpreter shuts down


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="noneuclid plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder, a config.json, or an id of the Hub")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs; not with --measure"
    )
    parser.add_argument("--gpus_per_node", type=int, default=8, help="the number of shards of hsdp")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="; ".join(f"{k}: {v}" for k, v in DTYPES.items())
    )
    parser.add_argument("--optim", default="muonmax_momo", help="a method of hf_noneuclid")
    parser.add_argument("--nuclear_norm", choices=NUCLEAR_NORMS, default="exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--measure", action="store_true", help="run the engine on the processes of torchrun")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses wrong numbers, and fills in the defaults that depend on ``--measure``."""
    for name, values in (("--gpus", args.gpus), ("--gpus_per_node", [args.gpus_per_node])):
        for value in values:
            if value < 1:
                parser.error(f"{name} {value}: give 1 or more")
    if args.measure and args.dtype not in (None, "fp32"):
        parser.error("--measure trains in float32: leave out --dtype (what is sent does not depend on it)")
    if args.measure and "WORLD_SIZE" not in os.environ:
        start = "torchrun --nproc_per_node=2 -m hf_noneuclid plan --measure"
        parser.error(f"--measure needs the processes of torchrun: start it with `{start}`")
    args.dtype = args.dtype or ("fp32" if args.measure else "bf16")
    args.model = args.model or ("tiny" if args.measure else "llama-7b")
