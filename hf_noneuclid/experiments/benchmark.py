"""What an optimizer step costs: AdamW, torch's Muon and our methods side by side, on the shapes of models.

    python recipes/benchmark.py --shapes gpt2 --contenders adamw muon muonmax_momo:nuclear_norm=stale
    python recipes/benchmark.py --shapes gpt2-large --device cuda --output costs.json

Builds a model from its configuration (nothing is downloaded), fills its gradients with random numbers, and
lets the contenders step in turn, all on the same parameters and gradients. Prints times and their ratios
round by round, the rate and the accuracy of the polar factors, memory, and the share of a training step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from hf_noneuclid.experiments.common import describe_hardware
from hf_noneuclid.experiments.costs import contenders, timing
from hf_noneuclid.experiments.costs.contenders import Contender
from hf_noneuclid.experiments.plan import _number, _table
from hf_noneuclid.polar import polar_factor

BASELINES = ("adamw", "torch_muon", "muon")
MICRO_BATCH = {"cuda": 8192, "cpu": 512}
LONGEST_SEQUENCE = 1024
TRAINING_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    report = measure(args)
    print(json.dumps(report) if args.json else text(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured: seconds, bytes, operations and tokens, and ratios of them."""
    device = torch.device(args.device)
    model = contenders.build(args.shapes, device)
    training = None if args.no_training else training_cost(model, args.micro_batch, args.tokens)
    contenders.fill_gradients(model)
    fields = [contenders.make(name, model) for name in args.contenders]
    matmul = timing.matmul_rate(device, _largest_rows(model))
    rows = contender_rows(fields, args.rounds, device)
    for row in rows:
        _relate(row, matmul, training)
    if args.profile:
        timing.write_trace(fields[-1].step, device, args.profile)
    return {
        "hardware": describe_hardware(device),
        **{key: getattr(args, key) for key in ("shapes", "device", "rounds", "tokens")},
        **_sizes(model),
        "matmul": matmul,
        "training": training,
        "accuracy": accuracy(model, fields),
        "contenders": rows,
    }


def training_cost(model: nn.Module, micro_batch: int, tokens: int) -> dict[str, Any]:
    """Time forward and backward of one micro-batch.

    Args:
        model: A causal language model. Its gradients are added to.
        micro_batch: Tokens, cut to whole sequences.
        tokens: Of a whole step, to which ``seconds`` of the micro-batch are scaled.
    """
    device = next(model.parameters()).device
    length = min(micro_batch, model.config.max_position_embeddings, LONGEST_SEQUENCE)
    ids = torch.randint(model.config.vocab_size, (micro_batch // length, length), device=device)
    half = device.type == "cuda"

    def forward_backward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    forward_backward()
    seconds = median(timing.seconds_of(forward_backward, device) for _ in range(TRAINING_ROUNDS))
    return {
        **{"micro_batch": ids.numel(), "sequence": length, "dtype": "bfloat16" if half else "float32"},
        **{"seconds": seconds, "tokens": tokens, "seconds_of_tokens": seconds * tokens / ids.numel()},
    }


def contender_rows(fields: Sequence[Contender], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time the contenders in turn, then look at each by itself."""
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
            "polar": _polar(contender, device),
            **timing.costs_of_one(contender.step, device),
            "note": contender.note,
        }
        for contender in fields
    ]


def _polar(contender: Contender, device: torch.device) -> dict[str, Any] | None:
    if contender.polar is None:
        return None
    cost = timing.polar_cost(contender.step, device)
    rate = cost.flops / cost.seconds if cost.flops else None
    return {"seconds": cost.seconds, "flops": cost.flops, "flops_per_second": rate}


def _relate(row: dict[str, Any], matmul: dict[str, Any], training: dict[str, Any] | None) -> None:
    """Add what follows from a contender's time and the machine's."""
    if polar := row["polar"]:
        rate = polar["flops_per_second"]
        polar["share_of_matmul"] = rate and rate / matmul["flops_per_second"]
    step, rest = row["median_seconds"], training and training["seconds_of_tokens"]
    row["share_of_training"] = step / (step + rest) if rest else None


def accuracy(model: nn.Module, fields: Sequence[Contender]) -> dict[str, Any]:
    """Compare the polar factors of some of the gradients with a singular value decomposition's."""
    chosen = timing.sample(contenders.matrices(model))
    ours = {contender.polar for contender in fields if contender.polar}
    by_name = {
        f"{method}, {steps} steps": partial(polar_factor, method=method, steps=steps)
        for method, steps in sorted(ours)
    }
    errors = timing.polar_errors(chosen, {**by_name, "torch.optim.Muon": timing.torch_polar})
    return {"matrices": [list(m.shape) for m in chosen], "errors": errors}


def _largest_rows(model: nn.Module) -> int:
    """Return the shorter side of the largest matrix."""
    return max(min(matrix.shape[-2:]) for matrix in contenders.matrices(model))


def _sizes(model: nn.Module) -> dict[str, int]:
    of_matrices = contenders.matrices(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": len(of_matrices),
        "matrix_elements": sum(m.numel() for m in of_matrices),
    }


# ------------------------------------------------------------------------------------- printing


def text(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    rows, used = report["contenders"], report["hardware"]
    machine = ", ".join(filter(None, (used["gpu"], used["cpu"])))
    head = (
        f"{report['shapes']} ({report['parameters']:,} parameters, {report['matrices']:,} matrices of "
        f"{report['matrix_elements']:,} elements) on {machine}, {used['threads']} threads, torch "
        f"{used['torch']}; {report['rounds']} rounds in turn, ratios round by round: median (range)"
    )
    notes = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    table = _table(list(_cells(rows[0])), [list(_cells(row).values()) for row in rows])
    return "\n\n".join([head, table, _training(report), _polar_text(report), *notes])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    polar, share = row["polar"], row["share_of_training"]
    counts = polar and polar["flops"]
    counted = ("operators", "kernel_launches", "synchronisations", "copies_to_host")
    return {
        "contender": row["name"],
        "step, ms": _number(1e3 * row["median_seconds"]),
        **{f"/ {name}": _ratio(ratio) for name, ratio in row["ratios"].items()},
        "polar, ms": _number(1e3 * polar["seconds"]) if polar else "-",
        "polar, GFLOP": _number(polar["flops"] / 1e9) if counts else "-",
        "GFLOP/s": _number(polar["flops_per_second"] / 1e9) if counts else "-",
        "of matmul": f"{polar['share_of_matmul']:.0%}" if counts else "-",
        "extra memory, MB": _number(row["peak_extra_bytes"] / 1e6),
        **{name.replace("_", " "): f"{row[name]:,}" for name in counted if name in row},
        "of training": "-" if share is None else f"{share:.2%}",
    }


def _ratio(ratio: dict[str, float]) -> str:
    if ratio["lowest"] == ratio["highest"]:  # to itself, or of one round
        return _number(ratio["median"])
    return f"{ratio['median']:.3g} ({ratio['lowest']:.3g} to {ratio['highest']:.3g})"


def _training(report: dict[str, Any]) -> str:
    """Say what the share of a training step refers to."""
    cost = report["training"]
    if cost is None:
        return f"Share of a training step of {report['tokens']:,} tokens: not measured."
    return (
        f"Of training: optimizer / (forward + backward + optimizer) at {cost['tokens']:,} tokens a step. "
        f"{cost['micro_batch']:,} tokens in sequences of {cost['sequence']:,} take {cost['seconds']:.3g} s "
        f"in {cost['dtype']}; so {cost['tokens']:,} would take {cost['seconds_of_tokens']:.4g} s."
    )


def _polar_text(report: dict[str, Any]) -> str:
    matmul, found = report["matmul"], report["accuracy"]
    errors = "; ".join(f"{name}: {error:.3g}" for name, error in found["errors"].items())
    shapes = ", ".join("x".join(map(str, shape)) for shape in found["matrices"])
    return (
        f"Matmul: {_number(matmul['flops_per_second'] / 1e9)} GFLOP/s, {matmul['dtype']}, size "
        f"{matmul['size']:,}. Polar factors miss torch's SVD by (‖polar - U Vᵀ‖_F / √n, random gradients of "
        f"{shapes}) {errors}."
    )


# -------------------------------------------------------------------------------------- options


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", choices=list(contenders.SHAPES), default="gpt2", help="whose parameters are stepped"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(contenders.DEFAULT_CONTENDERS),
        help="adamw, torch_muon, or a method of hf_noneuclid as method:option=value,option=value",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--tokens", type=int, default=524288, help="of one training step")
    parser.add_argument("--micro_batch", type=int, help=f"tokens that are trained on; {MICRO_BATCH}")
    parser.add_argument("--no_training", action="store_true", help="leave out the share of a training step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--output", type=Path, help="a file for that object")
    parser.add_argument("--profile", type=Path, help="a file for a Chrome trace of one step of the last one")
    args = parser.parse_args(argv)
    args.micro_batch = MICRO_BATCH[args.device] if args.micro_batch is None else args.micro_batch
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("rounds", "tokens", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if len(set(args.contenders)) < len(args.contenders):
        parser.error("--contenders: one is named twice")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    try:
        for name in args.contenders:
            contenders.check(name)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
