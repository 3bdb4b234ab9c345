"""The text that ``noneuclid plan`` and ``noneuclid benchmark`` print."""

from collections.abc import Callable, Sequence
from typing import Any

from hf_noneuclid.experiments.common import markdown_table
from hf_noneuclid.experiments.costs.engines import DTYPES

Row = dict[str, Any]


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
    """The report of ``noneuclid plan`` as tables."""
    rows = report["rows"]
    purposes = [key.replace("_", " ") for key in rows[0]["memory_bytes"]]

    def memory(row: Row) -> list[str]:
        held = [*row["memory_bytes"].values(), sum(row["memory_bytes"].values())]
        return [*(number(x / report["parameters"]) for x in held), f"{held[-1] / 1e9:,.2f}"]

    return "\n\n".join(
        [
            f"{report['model']}, {report['optim']}, nuclear_norm {report['nuclear_norm']}, "
            f"{report['dtype']} ({DTYPES[report['dtype']]})\n"
            f"{report['parameters']:,} parameters, {report['matrix_elements']:,} of them in "
            f"{report['matrices']:,} matrices; {report['units']:,} matrices and vectors; "
            f"{report['second_moment_elements']:,} parameters with a second moment",
            "Memory of the fullest GPU, bytes per parameter (without activations and gathered weights):",
            _table([*purposes, "sum", "GB"], rows, memory),
            "Sent by a GPU in a step, mean (max where it differs); the engine's own: gradients and weights:",
            _table([*rows[0]["sent_bytes"], "engine's own", "sum / engine's own"], rows, _sent),
            "Polar factors, floating-point operations of a GPU in one step:",
            _table(["mean TFLOP", "max TFLOP", "max / mean", "GPUs that own nothing"], rows, _operations),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> str:
    body = [[row["engine"], f"{row['gpus']:,}", *cells(row)] for row in rows]
    return markdown_table(["engine", "GPUs", *head], body)


def _sent(row: Row) -> list[str]:
    sent = []
    for value in row["sent_bytes"].values():
        mean, most = byte_size(value["mean"]), byte_size(value["max"])
        sent.append(mean if mean == most else f"{mean} ({most})")
    ratio = "-" if row["ratio"] is None else number(row["ratio"])
    return [*sent, byte_size(row["engine_sent_bytes"]), ratio]


def _operations(row: Row) -> list[str]:
    flops = row["polar_flops"]
    numbers = [flops["mean"] / 1e12, flops["max"] / 1e12, flops["imbalance"]]
    return [*map(number, numbers), f"{row['idle_ranks']:,}"]


# ---------------------------------------------------------------- the benchmark


def benchmark_text(report: Row) -> str:
    """The report of ``noneuclid benchmark``."""
    rows, used = report["contenders"], report["hardware"]
    machine = ", ".join(filter(None, (used["gpu"], used["cpu"])))
    head = (
        f"{report['shapes']} ({report['parameters']:,} parameters, {report['matrix_elements']:,} of them in "
        f"matrices) on {machine}, {used['threads']} threads, torch {used['torch']}; {report['rounds']} "
        f"rounds in turn, ratios round by round: median (range). A "
        f"product of square matrices runs at {number(report['matmul_flops_per_second'] / 1e9)} GFLOP/s."
    )
    table = markdown_table(list(_cells(rows[0])), [list(_cells(row).values()) for row in rows])
    return "\n\n".join([head, table, *(f"{row['name']}: {row['note']}." for row in rows if row["note"])])


def _cells(row: Row) -> dict[str, str]:
    seconds, flops, ratios = row["polar_seconds"], row["polar_flops"], row["ratios"].items()
    return {
        "contender": row["name"],
        "step, ms": number(row["median_seconds"] / 1e-3),
        **{f"/ {name}": f"{x['median']:.3g} ({x['lowest']:.3g} to {x['highest']:.3g})" for name, x in ratios},
        "polar, ms": number(seconds / 1e-3) if seconds else "-",
        "polar, GFLOP": number(flops / 1e9) if flops else "-",
        "of matmul": f"{row['share_of_matmul']:.0%}" if flops else "-",
        "extra memory, MB": number(round(row["peak_extra_bytes"] / 1e6, 1)),
    }
