"""Plan a run that cannot be tried: memory, communication and polar factors per GPU, from the shapes alone.

    python recipes/plan.py --model llama-7b --engine all --gpus 8 64 1024
    torchrun --nproc_per_node=2 recipes/plan.py --measure --engine fsdp2 zero3

The first builds nothing but a configuration and prints, for each engine and number of GPUs, what a GPU
holds, sends and computes in one optimizer step, and the formulas. The second takes three steps with the
engine on the processes that it is launched with, and prints what was sent beside what the first predicts.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from hf_noneuclid.experiments.common import ExitCode
from hf_noneuclid.experiments.costs.engine_costs import DTYPES, ENGINE_SENT, MODEL_STATE, plan_row
from hf_noneuclid.experiments.costs.layout_costs import ENGINES, Costs, Shapes, grid_of, shapes_of
from hf_noneuclid.options import NUCLEAR_NORMS

MODELS = {
    "gpt2": GPT2Config(),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "llama-7b": LlamaConfig(),
    # Small, with rows and a vocabulary that no number of ranks divides.
    "tiny": GPT2Config(
        vocab_size=97,
        n_positions=16,
        n_embd=26,
        n_inner=51,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    ),
}
LETTERS = """P parameters, M of them in K matrices; U matrices and vectors; V parameters with a second moment
n GPUs = r replicas x s shards; w, x, g bytes of a weight kept, a weight sent, a gradient sent
d bytes of a direction; H elements of matrices that their owners hold already
L elements of matrices in a shard, with what pads them where an all-gather takes them"""
STEP = {
    "optimizer state": "(4 P + 4 V)/s, and 4 bytes for each scalar",
    "polar factors": "d times the elements of the owned matrices, kept from measuring to moving (exact)",
    "workspace": "one batch of matrices, or two float32 copies of 256 MiB; ZeRO: float32 gradients",
    "momentum": "all-to-all to the owners: 4 (M - H)/n",
    "directions": "all-to-all back: d (M - H)/n",
    "replicas": "all-gather or broadcasts: d L (r-1)/r",
    "scalars": "ring all-reduces: 2 * 4 (U + 5) (n-1)/n, stale 2 * 4 (U + 5 + K) (n-1)/n",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan, or the measurements."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        config = load_config(args.model)
        if args.measure:
            from hf_noneuclid.experiments.costs import measured_costs  # DeepSpeed is asked for only here

            measured_costs.main(args, config)
            return
        shapes = shapes_of(_meta_model(config), args.optim, nuclear_norm=args.nuclear_norm)
        rows = [
            plan_row(
                Costs(shapes, engine, grid_of(engine, gpus, args.gpus_per_node), args.device), args.dtype
            )
            for engine in args.engines
            for gpus in args.gpus
        ]
    except ValueError as error:
        _fail(str(error))
    print(json.dumps({**_header(args, shapes), "rows": rows}) if args.json else _text(args, shapes, rows))


def load_config(name: str) -> PretrainedConfig:
    """Return a configuration by name; the known names need no network.

    Args:
        name: A key of ``MODELS``, a folder, a ``config.json``, or an id of the Hub.

    Raises:
        ValueError: There is none.
    """
    if name in MODELS:
        return MODELS[name]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {name} is none of {', '.join(MODELS)}, and no folder, config.json or Hub id either: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _meta_model(config: PretrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _header(args: argparse.Namespace, shapes: Shapes) -> dict[str, Any]:
    return {
        **{key: getattr(args, key) for key in ("model", "optim", "nuclear_norm", "dtype", "device")},
        "parameters": shapes.parameters,
        "matrix_elements": shapes.matrix_elements,
        "second_moment_elements": shapes.adaptive_elements,
        "matrices": shapes.matrix_units,
        "units": shapes.units,
    }


def _text(args: argparse.Namespace, shapes: Shapes, rows: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{args.model}, {args.optim}, nuclear_norm {args.nuclear_norm}, {args.device}, "
        f"{args.dtype} ({DTYPES[args.dtype]})\n"
        f"P = {shapes.parameters:,}, M = {shapes.matrix_elements:,}, K = {shapes.matrix_units:,}, "
        f"U = {shapes.units:,}, V = {shapes.adaptive_elements:,}"
    )
    sections = [
        head,
        "Memory of the fullest GPU, bytes per parameter (without activations and gathered weights):",
        _memory_table(rows, shapes.parameters),
        "Sent by a GPU in one step, mean (max where it differs); the engine's own: gradients and weights:",
        _sent_table(rows),
        "Polar factors, floating-point operations of a GPU in one step:",
        _flops_table(rows),
        "Formulas:",
        _formulas(args.engines, rows),
    ]
    return "\n\n".join(sections)


def _memory_table(rows: Sequence[dict[str, Any]], parameters: int) -> str:
    head = ["engine", "GPUs", *(key.replace("_", " ") for key in rows[0]["memory_bytes"]), "sum", "GB"]
    body = []
    for row in rows:
        held = list(row["memory_bytes"].values())
        per_parameter = [_number(x / parameters) for x in [*held, sum(held)]]
        body.append([row["engine"], f"{row['gpus']:,}", *per_parameter, f"{sum(held) / 1e9:,.2f}"])
    return _table(head, body)


def _sent_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["engine", "GPUs", *rows[0]["sent_bytes"], "engine's own", "sum / engine's own"]
    return _table(
        head,
        (
            [
                *(row["engine"], f"{row['gpus']:,}", *map(_sent, row["sent_bytes"].values())),
                *(_bytes(row["engine_sent_bytes"]), "-" if row["ratio"] is None else _number(row["ratio"])),
            ]
            for row in rows
        ),
    )


def _flops_table(rows: Sequence[dict[str, Any]]) -> str:
    return _table(
        ["engine", "GPUs", "mean TFLOP", "max TFLOP", "max / mean", "GPUs that own nothing"],
        (
            [
                *(row["engine"], f"{row['gpus']:,}"),
                *(_number(row["polar_flops"][key] / 1e12) for key in ("mean", "max")),
                *(_number(row["polar_flops"]["imbalance"]), f"{row['idle_ranks']:,}"),
            ]
            for row in rows
        ),
    )


def _formulas(engines: Iterable[str], rows: Sequence[dict[str, Any]]) -> str:
    lines = [LETTERS, *(f"{name}: {formula}" for name, formula in STEP.items())]
    for engine in engines:
        lines.append(f"{engine} keeps {MODEL_STATE[engine]}\n{engine} sends {ENGINE_SENT[engine]}")
        for row in rows:
            if row["engine"] == engine:
                lines.append(_letters(row))
    return "\n".join(lines)


def _letters(row: dict[str, Any]) -> str:
    sizes = ", ".join(f"{letter} = {value}" for letter, value in row["widths"].items())
    return (
        f"  n = {row['gpus']:,}: r = {row['replicas']:,}, s = {row['shards']:,}, {sizes}, "
        f"d = {row['direction_bytes']}, H = {row['at_home']:,}, L = {row['handed_on']:,.0f}: "
        f"momentum {_bytes(row['sent_bytes']['momentum']['mean'])}, "
        f"directions {_bytes(row['sent_bytes']['directions']['mean'])}, "
        f"replicas {_bytes(row['sent_bytes']['replicas']['mean'])}, "
        f"engine's own {_bytes(row['engine_sent_bytes'])}"
    )


def _sent(value: dict[str, float]) -> str:
    mean, most = _bytes(value["mean"]), _bytes(value["max"])
    return mean if mean == most else f"{mean} ({most})"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def _fail(message: str) -> NoReturn:
    print(f"plan.py: error: {message}", file=sys.stderr)
    raise SystemExit(ExitCode.BAD_INPUT)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder, a config.json, or an id of the Hub")
    parser.add_argument("--engine", choices=[*ENGINES, "all"], nargs="+", default=["all"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8], help="how many; not with --measure")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="shards of hsdp")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="; ".join(f"{k}: {v}" for k, v in DTYPES.items())
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cuda sends bfloat16")
    parser.add_argument("--optim", default="muonmax_momo", help="a method of hf_noneuclid")
    parser.add_argument("--nuclear_norm", choices=NUCLEAR_NORMS, default="exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--measure", action="store_true", help="run the engine on the processes of torchrun")
    args = parser.parse_args(argv)
    _check(parser, args)
    args.engines = list(ENGINES) if "all" in args.engine else args.engine
    args.dtype = args.dtype or ("fp32" if args.measure else "bf16")
    args.model = args.model or ("tiny" if args.measure else "llama-7b")
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, values in (("--gpus", args.gpus), ("--gpus_per_node", [args.gpus_per_node])):
        if wrong := [value for value in values if value < 1]:
            parser.error(f"{name} {wrong[0]}: at least 1")
    if args.measure and args.dtype not in (None, "fp32"):
        parser.error("--measure trains in float32: leave out --dtype (what is sent does not depend on it)")


if __name__ == "__main__":
    main()
