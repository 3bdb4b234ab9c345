"""The report as Markdown, written from the numbers of results.json."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting.report_comparisons import (
    batch_size_section,
    lower_bound_section,
    paper_section,
    variants_section,
)
from reporting.report_format import band, decades, loss, number, rate, table
from sweeping.suite import as_text

Summary = Mapping[str, Any]

CAPTIONS = {
    "final_loss.png": "Final validation loss against learning rate: mean over seeds, the band from the "
    "lowest to the highest seed. Solid with Momo, dashed without. Above the top edge: crosses where a "
    "seed diverged, triangles where the loss is too high for the figure.",
    "training.png": "Training and evaluation loss of each method at its best learning rate, mean over seeds.",
    "step_size.png": "Step size τ (solid) and scheduled learning rate η (dashed) of the first seed.",
    "variants.png": "The variants: best final loss over learning rates, and regret at the highest of them.",
    "lower_bound.png": "Final loss against the lower bound F*. Crosses above the top edge: a seed "
    "diverged, or the loss is too high for the figure.",
    "batch_size.png": "Best learning rate, and the final loss there, against batch size.",
}


def markdown(summary: Summary, figures: Sequence[str]) -> str:
    """Return the whole report.

    Args:
        summary: what summary.py made of the study.
        figures: names of the PNG files beside the report.
    """
    sections: list[Callable[[Summary], str]] = [
        _head,
        paper_section,
        _best_section,
        _basin_section,
        lower_bound_section,
        variants_section,
        batch_size_section,
        _loss_section,
        _regret_section,
        _target_section,
        _ran_section,
    ]
    texts = [text for section in sections if (text := section(summary))]
    shown = "\n\n".join(f"![{Path(name).stem}]({name})\n\n{CAPTIONS[name]}" for name in figures)
    return "\n\n".join(filter(None, [texts[0], shown, *texts[1:]])) + "\n"


def _head(summary: Summary) -> str:
    suite, ran = summary["suite"], summary["ran"]
    lines = [f"# {suite['name']}", suite["about"]]
    if ran["missing"]:
        lines.append(
            f"**Unfinished: {ran['missing']} of the {ran['wanted']} runs known so far are missing.** Means "
            "are over the seeds that have ended, a learning rate without any is a hole in its curve, and "
            "what follows may change."
        )
    lines.append(
        "Losses are in nats per token, over all of the validation part at the end of training. ± is the "
        "sample standard deviation over seeds. A learning rate at which any seed diverged counts as an "
        "infinite loss."
    )
    return "\n\n".join(lines)


# ----------------------------------------------------------------------------------------- measures


def _best_section(summary: Summary) -> str:
    head = ("method", "best final loss", "seeds", "learning rate", "learning rates with a diverged seed")
    rows = []
    for curve in summary["curves"]:
        best = curve["best"] or {}
        gone = [rate(point["learning_rate"]) for point in curve["points"] if point["diverged"]]
        cells = [
            band(best.get("loss"), best.get("std")),
            number(best.get("seeds")),
            rate(best.get("learning_rate")),
        ]
        rows.append([curve["label"], *cells, ", ".join(gone) or "-"])
    return f"## Best final loss\n\n{table(head, rows)}"


def _basin_section(summary: Summary) -> str:
    if summary["best_loss"] is None:
        return ""
    fractions = list(summary["curves"][0]["basins"])
    head = (
        "method",
        *(f"basin, {fraction} (decades)" for fraction in fractions),
        "robustness: largest regret within a decade",
        "regret at 10x",
        "at 30x",
    )
    rows = [
        [
            curve["label"],
            *(_basin(curve["basins"][fraction]) for fraction in fractions),
            _robustness(curve["robustness"]),
            *(loss(value) for value in curve["regret_at_factor"].values()),
        ]
        for curve in summary["curves"]
    ]
    best = summary["best_loss"]
    limits = {f: curve["threshold"] for f, curve in summary["curves"][0]["basins"].items()}
    words = " and ".join(f"{fraction} ({loss(limit)})" for fraction, limit in limits.items())
    text = (
        f"Basin width: decades of learning rate over which the final loss is within {words} of the best that "
        f"any method reached here, {loss(best)}. Between grid points the loss is interpolated linearly in "
        "the logarithm of the learning rate; towards a learning rate that diverged nothing is interpolated, "
        "the basin ends at the last good grid point. ≥: it reaches an end of the grid or a run that is "
        "missing. Robustness: the largest regret (final loss minus the method's own best) within a decade of "
        "the method's best learning rate, above or below (≥: the grid has no point a decade away on one "
        "side, or a hole before); regret at 10 and 30 times the best (-: not in the grid)."
    )
    parts = ["## Robustness to the learning rate", text, table(head, rows), _momo_gains(summary)]
    return "\n\n".join(filter(None, parts))


def _momo_gains(summary: Summary) -> str:
    gains = summary["momo_gains"]
    if not gains:
        return ""
    fractions = list(gains[0]["gains"])
    head = ("with Momo", *(f"wider than without, {fraction} (decades)" for fraction in fractions))
    return table(head, ([row["label"], *map(_gain, row["gains"].values())] for row in gains))


def _gain(found: Mapping[str, Any]) -> str:
    sign = "≥ " * found["at_least"] + "≤ " * found["at_most"]
    return f"{sign}{found['decades']:+.2f}{' (both cut off)' * found['cut_off']}"


def _basin(found: Mapping[str, Any]) -> str:
    if not found["learning_rates"]:
        return "0.00"
    where = ", ".join(f"{low:.2g} to {high:.2g}" for low, high in found["learning_rates"])
    return f"{decades(found['decades'], found['at_least'])} ({where})"


def _robustness(found: Mapping[str, Any]) -> str:
    value = loss(found["regret"])
    finite = found["regret"] is not None and math.isfinite(found["regret"])
    return f"≥ {value}" if found["at_least"] and finite else value


def _loss_section(summary: Summary) -> str:
    return _by_rate(summary, "Final loss at each learning rate", _point)


def _regret_section(summary: Summary) -> str:
    return _by_rate(summary, "Regret at each learning rate", lambda point: loss(point["regret"]))


def _by_rate(summary: Summary, title: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
    curves = summary["curves"]
    rates = sorted({point["learning_rate"] for curve in curves for point in curve["points"]})
    rows = []
    for curve in curves:
        points = {point["learning_rate"]: point for point in curve["points"]}
        rows.append([curve["label"], *(cell(points[value]) if value in points else "" for value in rates)])
    return f"## {title}\n\n{table(['method', *map(rate, rates)], rows)}"


def _point(point: Mapping[str, Any]) -> str:
    if point["diverged"]:
        total = point["diverged"] + point["seeds"] + point["missing"]
        steps = ", ".join(str(step) for step in point["diverged_at"] if step is not None)
        which = f" ({point['diverged']} of {total})" if total > 1 else ""
        return f"diverged{which}{f' at step {steps}' if steps else ''}"
    return band(point["loss"], point["std"])


# ------------------------------------------------------------------------------------------ targets


def _target_section(summary: Summary) -> str:
    if not summary["targets"]:
        return ""
    text = (
        "At each method's best learning rate: the first evaluation along the way at or below the target, "
        "mean over the seeds that reach it. Seconds are that part of the training time, without start-up, as "
        "measured: runs side by side share the machine."
    )
    parts = [f"## Time to a target loss\n\n{text}"]
    for target in summary["targets"]:
        head = ("method", f"seeds that reach {target['loss']:g}", "steps", "seconds")
        rows = [
            [
                way["label"],
                f"{way['reached']} of {way['seeds']}",
                number(way["steps"]),
                number(way["seconds"]),
            ]
            for way in target["curves"]
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------- provenance


def _ran_section(summary: Summary) -> str:
    suite, ran = summary["suite"], summary["ran"]
    counts = ", ".join(f"{count} {state}" for state, count in ran["states"].items())
    lines = [
        f"- Command: `python recipes/sweep.py --suite {suite['name']}`",
        f"- Runs: {counts}; {ran['missing']} of {ran['wanted']} missing",
        f"- Hours: {ran['hours']:.2f}, summed over the runs whose time is known, start-up included",
        *_facts("Hardware", map(_hardware, ran["hardware"])),
        *_facts("Versions", map(_pairs, ran["versions"])),
        *_facts("Corpus", map(_pairs, ran["corpus"])),
        *_facts("Parameters", (f"{count:,}" for count in ran["parameters"])),
        f"- Common options: {_pairs(suite['options'])}",
        *(f"- Options of {method}: {_pairs(flags)}" for method, flags in suite["per_method"].items()),
    ]
    if ran["command"]:
        lines.append(
            f"- The first run: `recipes/{suite['recipe']}.py {shlex.join(map(str, ran['command']))}`"
        )
    parts = ["## What was run", "\n".join(lines)]
    if ran["failed"]:
        head = ("method", "options", "learning rate", "seed", "reason")
        parts.append(f"### Failed runs\n\n{table(head, map(_failed, ran['failed']))}")
    return "\n\n".join(parts)


def _failed(run: Mapping[str, Any]) -> list[str]:
    options = _pairs({**run["method_options"], **run["options"]})
    reason = " ".join(str(run["reason"]).split()).replace("|", "\\|")
    return [run["method"], options, rate(run["learning_rate"]), str(run["seed"]), reason]


def _facts(name: str, values: Iterable[str]) -> list[str]:
    """Return one line for each value: several mean that the runs differ in it."""
    return [f"- {name}: {value}" for value in values] or [f"- {name}: not recorded"]


def _hardware(found: Mapping[str, Any]) -> str:
    machine = ", ".join(filter(None, (found.get("gpu"), found.get("cpu"))))
    return f"{machine}; threads {found.get('threads', '?')}, processes a run {found.get('processes', '?')}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {as_text(value)}" for name, value in values.items()) or "-"
