"""The text that ``noneuclid plan`` and ``noneuclid benchmark`` print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hf_noneuclid.experiments.common import markdown_table
from hf_noneuclid.experiments.costs.engines import DTYPES, ENGINE_SENT, MODEL_STATE

Row = dict[str, Any]

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

_SENT = "Sent by a GPU in one step, mean (max where it differs); the engine's own: gradients and weights:"


def number(value: float) -> str:
    """A number with three digits, or more where it is a thousand or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def byte_size(value: float) -> str:
    """A number of bytes with three digits and its unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


# ---------------------------------------------------------------- the plan


def plan_text(report: Row) -> str:
    """The report of ``noneuclid plan`` as tables and formulas."""
    rows = report["rows"]
    return "\n\n".join(
        [
            f"{report['model']}, {report['optim']}, nuclear_norm {report['nuclear_norm']}, "
            f"{report['device']}, {report['dtype']} ({DTYPES[report['dtype']]})\n"
            f"P = {report['parameters']:,}, M = {report['matrix_elements']:,}, K = {report['matrices']:,}, "
            f"U = {report['units']:,}, V = {report['second_moment_elements']:,}",
            "Memory of the fullest GPU, bytes per parameter (without activations and gathered weights):",
            _memory_table(rows, report["parameters"]),
            _SENT,
            _sent_table(rows),
            "Polar factors, floating-point operations of a GPU in one step:",
            _flops_table(rows),
            "Formulas:",
            _formulas(rows),
        ]
    )


def _memory_table(rows: Sequence[Row], parameters: int) -> str:
    def cells(row: Row) -> list[str]:
        held = [*row["memory_bytes"].values(), sum(row["memory_bytes"].values())]
        return [*(number(x / parameters) for x in held), f"{held[-1] / 1e9:,.2f}"]

    purposes = [key.replace("_", " ") for key in rows[0]["memory_bytes"]]
    return _table([*purposes, "sum", "GB"], rows, cells)


def _sent_table(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        sent = [_mean_and_max(value) for value in row["sent_bytes"].values()]
        ratio = "-" if row["ratio"] is None else number(row["ratio"])
        return [*sent, byte_size(row["engine_sent_bytes"]), ratio]

    return _table([*rows[0]["sent_bytes"], "engine's own", "sum / engine's own"], rows, cells)


def _mean_and_max(value: dict[str, float]) -> str:
    mean, most = byte_size(value["mean"]), byte_size(value["max"])
    return mean if mean == most else f"{mean} ({most})"


def _flops_table(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        flops = row["polar_flops"]
        numbers = [flops["mean"] / 1e12, flops["max"] / 1e12, flops["imbalance"]]
        return [*map(number, numbers), f"{row['idle_ranks']:,}"]

    return _table(["mean TFLOP", "max TFLOP", "max / mean", "GPUs that own nothing"], rows, cells)


def _table(head: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> str:
    body = [[row["engine"], f"{row['gpus']:,}", *cells(row)] for row in rows]
    return markdown_table(["engine", "GPUs", *head], body)


def _formulas(rows: Iterable[Row]) -> str:
    lines = [LETTERS, *(f"{name}: {formula}" for name, formula in STEP.items())]
    engine = ""
    for row in rows:
        if row["engine"] != engine:
            engine = row["engine"]
            lines += [f"{engine} keeps {MODEL_STATE[engine]}", f"{engine} sends {ENGINE_SENT[engine]}"]
        sizes = "".join(f"{letter} = {value}, " for letter, value in row["widths"].items())
        sent = (f"{key} {byte_size(value['mean'])}, " for key, value in row["sent_bytes"].items())
        momentum, directions, replicas, *_ = sent
        lines.append(
            f"  n = {row['gpus']:,}: r = {row['replicas']:,}, s = {row['shards']:,}, {sizes}"
            f"d = {row['direction_bytes']}, H = {row['at_home']:,}, L = {row['handed_on']:,.0f}: "
            f"{momentum}{directions}{replicas}engine's own {byte_size(row['engine_sent_bytes'])}"
        )
    return "\n".join(lines)


def measured_text(report: Row) -> str:
    """The report of ``noneuclid plan --measure``: a row for each engine, rank and kind of bytes."""
    rows, ranks, parameters = report["rows"], report["ranks"], report["rows"][0]["parameters"]
    body = []
    for row in rows:
        for name, measured in row["measured"].items():
            if measured or row["predicted"][name]:
                numbers = [f"{measured:,}", f"{row['predicted'][name]:,}", f"{measured / parameters:.4f}"]
                body.append([row["engine"], str(row["rank"]), name, *numbers])
    return (
        f"{report['model']}, {parameters:,} parameters, {ranks} processes, {report['optim']}, nuclear_norm "
        f"{report['nuclear_norm']}: bytes sent in one step by collective, and kept by the optimizer\n\n"
        + markdown_table(["engine", "rank", "bytes", "measured", "predicted", "measured per parameter"], body)
    )


# ---------------------------------------------------------------- the benchmark


def benchmark_text(report: Row) -> str:
    """The report of ``noneuclid benchmark``."""
    rows, used = report["contenders"], report["hardware"]
    machine = ", ".join(filter(None, (used["gpu"], used["cpu"])))
    head = (
        f"{report['shapes']} ({report['parameters']:,} parameters, {report['matrices']:,} matrices of "
        f"{report['matrix_elements']:,} elements) on {machine}, {used['threads']} threads, torch "
        f"{used['torch']}; {report['rounds']} rounds in turn, ratios round by round: median (range)"
    )
    notes = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    table = markdown_table(list(_cells(rows[0])), [list(_cells(row).values()) for row in rows])
    return "\n\n".join([head, table, _polar(report), *notes])


def _cells(row: Row) -> dict[str, str]:
    polar: Row = row["polar"] or {}
    counted = ("operators", "kernel_launches", "synchronisations", "copies_to_host")
    return {
        "contender": row["name"],
        "step, ms": _cell(row["median_seconds"], 1e-3),
        **{f"/ {name}": _ratio(ratio) for name, ratio in row["ratios"].items()},
        "polar, ms": _cell(polar.get("seconds"), 1e-3),
        "polar, GFLOP": _cell(polar.get("flops"), 1e9),
        "GFLOP/s": _cell(polar.get("flops_per_second"), 1e9),
        "of matmul": f"{polar['share_of_matmul']:.0%}" if polar.get("flops") else "-",
        "extra memory, MB": number(round(row["peak_extra_bytes"] / 1e6, 1)),
        **{name.replace("_", " "): f"{row[name]:,}" for name in counted if name in row},
    }


def _cell(value: float | None, unit: float) -> str:
    return number(value / unit) if value else "-"


def _ratio(ratio: dict[str, float]) -> str:
    if ratio["lowest"] == ratio["highest"]:  # to itself, or of one round
        return number(ratio["median"])
    return f"{ratio['median']:.3g} ({ratio['lowest']:.3g} to {ratio['highest']:.3g})"


def _polar(report: Row) -> str:
    matmul, found = report["matmul"], report["accuracy"]
    errors = "; ".join(f"{name}: {error:.3g}" for name, error in found["errors"].items())
    shapes = ", ".join("x".join(map(str, shape)) for shape in found["matrices"])
    return (
        f"Matmul: {number(matmul['flops_per_second'] / 1e9)} GFLOP/s, {matmul['dtype']}, size "
        f"{matmul['size']:,}. Polar factors miss torch's SVD by (‖polar - U Vᵀ‖_F / √n, random gradients of "
        f"{shapes}) {errors}."
    )
