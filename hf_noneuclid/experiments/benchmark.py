"""Measures what an optimizer step costs: AdamW, torch's Muon and our methods side by side.

    noneuclid benchmark --shapes gpt2 --contenders adamw muon muonmax_momo:nuclear_norm=stale
    noneuclid benchmark --shapes gpt2-large --json

Builds a model from its configuration (nothing is downloaded), on the GPU if there is one. Fills its gradients
with random numbers, and lets the contenders step in turn, all on the same parameters and gradients. Prints
times and their ratios round by round, the time of the polar factors, and memory.
"""

import argparse
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from hf_noneuclid.experiments.common import describe_hardware
from hf_noneuclid.experiments.costs import contenders, tables, timing
from hf_noneuclid.experiments.costs.models import MODELS, build

BASELINES = ("adamw", "torch_muon", "muon")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; ``argv`` is by default the command line of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    if len(set(args.contenders)) < len(args.contenders):
        parser.error("--contenders: a contender is named twice")
    try:
        report = measure(args)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(report) if args.json else tables.benchmark_text(report))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that is measured: seconds, bytes and operations, and ratios of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(MODELS[args.shapes], device)
    contenders.fill_gradients(model)
    fields = [contenders.make(name, model) for name in args.contenders]
    matrices = contenders.matrix_parameters(model)
    matmul = timing.matmul_rate(device, rows=max(min(p.shape[-2:]) for p in matrices))

    for contender in fields:
        for _ in range(contender.warm_up_steps):
            contender.step()
    times = timing.in_turn({contender.name: contender.step for contender in fields}, args.rounds, device)
    bases = [name for name in BASELINES if name in times]
    rows = []
    for contender in fields:
        seconds, flops = timing.polar_cost(contender.step, device)
        rows.append(
            {
                "name": contender.name,
                "seconds": times[contender.name],
                "median_seconds": median(times[contender.name]),
                "ratios": {name: timing.ratio(times[contender.name], times[name]) for name in bases},
                "polar_seconds": seconds,
                "polar_flops": flops,
                "share_of_matmul": flops / seconds / matmul if flops else None,
                "peak_extra_bytes": timing.peak_extra_bytes(contender.step, device),
                "note": contender.note,
            }
        )
    return {
        "hardware": describe_hardware(device),
        "shapes": args.shapes,
        "rounds": args.rounds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix_elements": sum(p.numel() for p in matrices),
        "matmul_flops_per_second": matmul,
        "contenders": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="noneuclid benchmark", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", choices=list(MODELS), default="gpt2", help="the model whose parameters are stepped"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(contenders.DEFAULT_CONTENDERS),
        help="adamw, torch_muon, or a method of hf_noneuclid as method:option=value,option=value",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser
