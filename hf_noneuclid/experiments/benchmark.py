"""Measures what an optimizer step costs: AdamW, torch's Muon and our methods side by side.

    noneuclid benchmark --shapes gpt2 --contenders adamw muon muonmax_momo:nuclear_norm=stale
    noneuclid benchmark --shapes gpt2-large --device cuda --output costs.json

Builds a model from its configuration (nothing is downloaded), fills its gradients with random numbers, and
lets the contenders step in turn, all on the same parameters and gradients. Prints times and their ratios
round by round, the rate and the accuracy of the polar factors, and memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_noneuclid.experiments.common import describe_hardware
from hf_noneuclid.experiments.costs import contenders, tables, timing
from hf_noneuclid.experiments.costs.contenders import Contender
from hf_noneuclid.experiments.costs.models import MODELS, build
from hf_noneuclid.polar import polar_factor

BASELINES = ("adamw", "torch_muon", "muon")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; ``argv`` is by default the command line of the process."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    report = measure(args)
    print(tables.benchmark_text(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that is measured: seconds, bytes and operations, and ratios of them."""
    device = torch.device(args.device)
    model = build(MODELS[args.shapes], device)
    contenders.fill_gradients(model)
    matrices = contenders.matrices(model)
    fields = [contenders.make(name, model) for name in args.contenders]
    matmul = timing.matmul_rate(device, rows=max(min(m.shape) for m in matrices))
    return {
        "hardware": describe_hardware(device),
        **{key: getattr(args, key) for key in ("shapes", "device", "rounds")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": len(matrices),
        "matrix_elements": sum(m.numel() for m in matrices),
        "matmul": matmul,
        "accuracy": accuracy(matrices, fields),
        "contenders": contender_rows(fields, args.rounds, device, matmul["flops_per_second"]),
    }


def contender_rows(
    fields: Sequence[Contender], rounds: int, device: torch.device, matmul_rate: float
) -> list[dict[str, Any]]:
    """Times the contenders in turn, then measures each by itself."""
    for contender in fields:
        for _ in range(contender.warm_up_steps):
            contender.step()
    times = timing.in_turn({contender.name: contender.step for contender in fields}, rounds, device)
    bases = [name for name in BASELINES if name in times]
    return [
        {
            "name": contender.name,
            "seconds": times[contender.name],
            "median_seconds": median(times[contender.name]),
            "ratios": {name: timing.ratio(times[contender.name], times[name]) for name in bases},
            "polar": _polar(contender, device, matmul_rate) if contender.polar else None,
            **timing.costs_of_one(contender.step, device),
            "note": contender.note,
        }
        for contender in fields
    ]


def _polar(contender: Contender, device: torch.device, matmul_rate: float) -> dict[str, Any]:
    seconds, flops = timing.polar_cost(contender.step, device)
    rate = flops / seconds if flops else None
    return {
        **{"seconds": seconds, "flops": flops, "flops_per_second": rate},
        "share_of_matmul": rate and rate / matmul_rate,
    }


def accuracy(matrices: Sequence[torch.Tensor], fields: Sequence[Contender]) -> dict[str, Any]:
    """Compares the polar factors of some matrices with those of a singular value decomposition."""
    chosen = timing.sample(matrices)
    ours = {contender.polar for contender in fields if contender.polar}
    by_name = {
        f"{method}, {steps} steps": partial(polar_factor, method=method, steps=steps)
        for method, steps in sorted(ours)
    }
    errors = timing.polar_errors(chosen, {**by_name, "torch.optim.Muon": timing.torch_polar})
    return {"matrices": [list(m.shape) for m in chosen], "errors": errors}


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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for everything that is measured")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    if len(set(args.contenders)) < len(args.contenders):
        parser.error("--contenders: a contender is named twice")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    try:
        for name in args.contenders:
            contenders.check(name)
    except ValueError as error:
        parser.error(str(error))
