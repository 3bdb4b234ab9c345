"""Plans a run that cannot be tried: memory, communication and polar factors of each GPU.

    noneuclid plan --model llama-7b --gpus 8 64 1024

Reads nothing but a configuration. Prints, for each engine and number of GPUs, what a GPU holds, sends and
computes in one optimizer step.
"""

import argparse
import json
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
    for name, values in (("--gpus", args.gpus), ("--gpus_per_node", [args.gpus_per_node])):
        if (lowest := min(values)) < 1:
            parser.error(f"{name} {lowest}: give 1 or more")
    try:
        report = predict(args)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(report) if args.json else tables.plan_text(report))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="noneuclid plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        default="llama-7b",
        help=f"{', '.join(MODELS)}, a folder, a config.json, or an id of the Hub",
    )
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="numbers of GPUs")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="the number of shards of hsdp")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="bf16",
        help="; ".join(f"{k}: {v}" for k, v in DTYPES.items()),
    )
    parser.add_argument("--optim", default="muonmax_momo", help="a method of hf_noneuclid")
    parser.add_argument("--nuclear_norm", choices=NUCLEAR_NORMS, default="exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser
