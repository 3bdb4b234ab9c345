"""The report as Markdown, written from the numbers of results.json."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.reporting.report_comparisons import (
    batch_size_section,
    lower_bound_section,
    paper_section,
    variants_section,
)
from hf_noneuclid.experiments.reporting.report_format import (
    Setting,
    Summary,
    band,
    decades,
    loss,
    number,
    per_setting,
    rate,
    several_settings,
    table,
)
from hf_noneuclid.experiments.sweeping.suite import as_text

CAPTIONS = {
    "final_loss.png": "Final validation loss against learning rate: mean over seeds, the band from the "
    "lowest to the highest seed. Solid with Momo, dashed without. Above the top edge: crosses where a "
    "seed diverged, triangles where the loss is too high for the figure. Where lower bounds F* are compared, "
    "a panel for each method and a line for each bound.",
    "training.png": "Training and evaluation loss of each method with its best options, at its best learning "
    "rate, mean over seeds.",
    "step_size.png": "Step size τ (solid) and scheduled learning rate η (dashed) of the first "
    "seed, for each method with its best options.",
    "variants.png": "The variants: best final loss over learning rates, and regret at the highest of them.",
    "lower_bound.png": "Final loss against the lower bound F*; the numbers are joined. Crosses above the top "
    "edge: a seed diverged, or the loss is too high for the figure.",
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
        "Losses are in nats per token (of a classifier: per text), over all of the validation part at the "
        "end of training. ± is the sample standard deviation over seeds. A learning rate at which any seed "
        "diverged counts as an infinite loss. The best is chosen among the learning rates with the most "
        "seeds."
    )
    if several_settings(summary):
        lines.append(
            f"The runs are of {len(summary['settings'])} settings (options of the recipe). Losses of "
            "different settings are not comparable: the best is always that of any method in the same "
            "setting."
        )
    return "\n\n".join(lines)


# ----------------------------------------------------------------------------------------- measures


def _best_section(summary: Summary) -> str:
    return f"## Best final loss\n\n{per_setting(summary, _best_table)}"


def _best_table(setting: Setting) -> str:
    head = ("method", "best final loss", "seeds", "learning rate", "learning rates with a diverged seed")
    rows = []
    for curve in setting["curves"]:
        best = curve["best"] or {}
        gone = [rate(point["learning_rate"]) for point in curve["points"] if point["diverged"]]
        cells = [
            band(best.get("loss"), best.get("std")),
            number(best.get("seeds")),
            rate(best.get("learning_rate")),
        ]
        rows.append([curve["label"], *cells, ", ".join(gone) or "-"])
    return table(head, rows)


def _basin_section(summary: Summary) -> str:
    known = [setting for setting in summary["settings"] if setting["best_loss"] is not None]
    if not known:
        return ""
    words = " and ".join(known[0]["curves"][0]["basins"])
    where = "in the same setting" if several_settings(summary) else "here"
    text = (
        f"Basin width: decades of learning rate over which the final loss is within {words} of the best that "
        f"any method reached {where}. Between grid points the loss is interpolated linearly in "
        "the logarithm of the learning rate; towards a learning rate that diverged nothing is interpolated, "
        "the basin ends at the last good grid point. ≥: it reaches an end of the grid or a run that is "
        "missing; -: no run has ended. Robustness: the largest regret (final loss minus the method's own "
        "best) within a decade of the method's best learning rate, above or below (≥: the grid has no point "
        "a decade away on one side, or a hole before); regret at 10 and 30 times the best (-: not in "
        "the grid)."
    )
    return f"## Robustness to the learning rate\n\n{text}\n\n{per_setting(summary, _robustness_table)}"


def _robustness_table(setting: Setting) -> str:
    if setting["best_loss"] is None:
        return "No run has ended with a finite loss."
    basins = setting["curves"][0]["basins"]
    head = (
        "method",
        *(f"basin, {fraction} (decades)" for fraction in basins),
        "robustness: largest regret within a decade",
        "regret at 10x",
        "at 30x",
    )
    rows = [
        [
            curve["label"],
            *(_basin(found) for found in curve["basins"].values()),
            _robustness(curve["robustness"]),
            *(loss(value) for value in curve["regret_at_factor"].values()),
        ]
        for curve in setting["curves"]
    ]
    limits = ", ".join(
        f"{fraction} above it {loss(found['threshold'])}" for fraction, found in basins.items()
    )
    best = f"Best of any method: {loss(setting['best_loss'])}; {limits}."
    return "\n\n".join(filter(None, [best, table(head, rows), _momo_gains(setting)]))


def _momo_gains(setting: Setting) -> str:
    gains = setting["momo_gains"]
    if not gains:
        return ""
    fractions = list(gains[0]["gains"])
    head = ("with Momo", *(f"wider than without, {fraction} (decades)" for fraction in fractions))
    return table(head, ([row["label"], *map(_gain, row["gains"].values())] for row in gains))


def _gain(found: Mapping[str, Any]) -> str:
    if found["decades"] is None:
        return "-"
    sign = "≥ " * found["at_least"] + "≤ " * found["at_most"]
    return f"{sign}{found['decades']:+.2f}{' (both cut off)' * found['cut_off']}"


def _basin(found: Mapping[str, Any]) -> str:
    width = decades(found["decades"], found["at_least"])
    if not found["learning_rates"]:
        return width
    where = ", ".join(f"{low:.2g} to {high:.2g}" for low, high in found["learning_rates"])
    return f"{width} ({where})"


def _robustness(found: Mapping[str, Any]) -> str:
    value = loss(found["regret"])
    finite = found["regret"] is not None and math.isfinite(found["regret"])
    return f"≥ {value}" if found["at_least"] and finite else value


def _loss_section(summary: Summary) -> str:
    return _by_rate(summary, "Final loss at each learning rate", _point)


def _regret_section(summary: Summary) -> str:
    return _by_rate(summary, "Regret at each learning rate", lambda point: loss(point["regret"]))


def _by_rate(summary: Summary, title: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
    def of_setting(setting: Setting) -> str:
        return _rates_table(setting["curves"], cell)

    return f"## {title}\n\n{per_setting(summary, of_setting)}"


def _rates_table(curves: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> str:
    rates = sorted({point["learning_rate"] for curve in curves for point in curve["points"]})
    rows = []
    for curve in curves:
        points = {point["learning_rate"]: point for point in curve["points"]}
        rows.append([curve["label"], *(cell(points[value]) if value in points else "" for value in rates)])
    return table(["method", *map(rate, rates)], rows)


def _point(point: Mapping[str, Any]) -> str:
    if point["diverged"]:
        total = point["diverged"] + point["seeds"] + point["missing"]
        steps = ", ".join(str(step) for step in point["diverged_at"] if step is not None)
        which = f" ({point['diverged']} of {total})" if total > 1 else ""
        return f"diverged{which}{f' at step {steps}' if steps else ''}"
    return band(point["loss"], point["std"])


# ------------------------------------------------------------------------------------------ targets


def _target_section(summary: Summary) -> str:
    tables = per_setting(summary, _target_tables)
    text = (
        "At each method's best learning rate: the first evaluation along the way at or below the target, "
        "mean over the seeds that reach it. Seconds are that part of the training time, without start-up, as "
        "measured: runs side by side share the machine."
    )
    return f"## Time to a target loss\n\n{text}\n\n{tables}" if tables else ""


def _target_tables(setting: Setting) -> str:
    return "\n\n".join(_target_table(target) for target in setting["targets"] if target["curves"])


def _target_table(target: Mapping[str, Any]) -> str:
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
    return table(head, rows)


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
