"""The report as Markdown, written from the numbers of results.json."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.common import InputError, markdown_table
from hf_noneuclid.experiments.reporting import measures
from hf_noneuclid.experiments.reporting.curves import VARIANT_OPTIONS, Curve, Point, best_of_each, by_setting
from hf_noneuclid.experiments.reporting.summary import STATES
from hf_noneuclid.experiments.reporting.tables import band, loss, number, per_setting, rate
from hf_noneuclid.experiments.sweeping.suite import as_text

Numbers = Mapping[str, Any]
"""A part of results.json."""

CAPTIONS = {
    "final_loss.png": "Final validation loss against learning rate: mean over seeds, with a band from the "
    "lowest to the highest seed. Solid with Momo, dashed without. Marks above the top edge: crosses where a "
    "seed diverged, triangles where the loss is too high for the figure. If options of the methods vary, "
    "there is a panel for each choice.",
    "training.png": "Training and evaluation loss of each method with its best options, at its best learning "
    "rate, mean over seeds.",
    "step_size.png": "Step size τ (solid) and scheduled learning rate η (dashed) of the first seed, for each "
    "method with its best options.",
    "variants.png": "The variants: best final loss over learning rates, and regret at the highest of them.",
}


def markdown(summary: Numbers, curves: Sequence[Curve], figures: Sequence[str]) -> str:
    """The whole report, from what ``summary.summarise`` gives and the names of the figures beside it."""
    texts = [
        _head(summary),
        *(f"![{Path(name).stem}]({name})\n\n{CAPTIONS[name]}" for name in figures),
        paper_section(summary["suite"]["report"], curves),
        f"## Best final loss\n\n{_per_setting(summary, _best_table)}",
        _basin_section(summary),
        variants_section(curves),
        f"## Final loss at each learning rate\n\n{_per_setting(summary, _losses)}",
        _target_section(summary),
        _ran_section(summary),
    ]
    return "\n\n".join(filter(None, texts)) + "\n"


def _per_setting(summary: Numbers, make: Callable[[Numbers], str]) -> str:
    return per_setting({setting["name"]: setting for setting in summary["settings"]}, make)


def _head(summary: Numbers) -> str:
    suite, ran = summary["suite"], summary["ran"]
    lines = [f"# {suite['name']}", suite["about"]]
    if ran["missing"]:
        lines.append(
            f"**Unfinished: {ran['missing']} of the {ran['wanted']} runs known so far are missing.** Means "
            "are over the seeds that have ended. A learning rate without any is a gap in its curve. The "
            "numbers below may change."
        )
    lines.append(
        "Losses are in nats per token (of a classifier: per text), over the whole validation part at the end "
        "of training. ± is the sample standard deviation over seeds. A learning rate at which a seed "
        "diverged counts as an infinite loss. The best is chosen among the learning rates with the most "
        "seeds; a single seed at another learning rate may have a lower loss."
    )
    if len(summary["settings"]) > 1:
        lines.append(
            f"The runs have {len(summary['settings'])} settings (options of the recipe). Losses of different "
            "settings are not comparable: the best is always that of any method in the same setting."
        )
    return "\n\n".join(lines)


# ---------------------------------------------------------------- measures


def _best_table(setting: Numbers) -> str:
    head = ("method", "best final loss", "seeds", "learning rate", "learning rates with a diverged seed")
    rows = []
    for curve in setting["curves"]:
        best = curve["best"] or {}
        gone = [rate(point["learning_rate"]) for point in curve["points"] if point["diverged"]]
        cells = [number(best.get("seeds")), rate(best.get("learning_rate")), ", ".join(gone) or "-"]
        rows.append([curve["label"], band(best.get("loss"), best.get("std")), *cells])
    return markdown_table(head, rows)


def _basin_section(summary: Numbers) -> str:
    known = [setting for setting in summary["settings"] if setting["best_loss"] is not None]
    if not known:
        return ""
    words = " and ".join(known[0]["curves"][0]["basins"])
    where = "in the same setting" if len(summary["settings"]) > 1 else "here"
    text = (
        f"Basin width: decades of learning rate over which the final loss is within {words} of the best that "
        f"any method reached {where}. Between grid points the loss is interpolated linearly in the logarithm "
        "of the learning rate. It is not interpolated towards a learning rate that diverged: the basin ends "
        "at the last good grid point. ≥: the basin reaches an end of the grid or a missing run. -: no run "
        "has ended.\n\n"
        "Robustness: the largest regret within a decade of the method's best learning rate, above or below. "
        "Regret is the final loss minus the method's own best; it is negative where a learning rate with "
        "fewer seeds has a lower loss. ≥: the grid has no point a decade away on a side, or a gap before it."
    )
    return f"## Robustness to the learning rate\n\n{text}\n\n{_per_setting(summary, _robustness_table)}"


def _robustness_table(setting: Numbers) -> str:
    if setting["best_loss"] is None:
        return "No run has ended with a finite loss."
    basins = setting["curves"][0]["basins"]
    head = ["method", *(f"basin, {fraction} (decades)" for fraction in basins)]
    head += ["robustness: largest regret within a decade"]
    rows = []
    for curve in setting["curves"]:
        worst = curve["robustness"]
        open_end = worst["at_least"] and worst["regret"] is not None and math.isfinite(worst["regret"])
        cells = [*map(_basin, curve["basins"].values()), "≥ " * open_end + loss(worst["regret"])]
        rows.append([curve["label"], *cells])
    limits = ", ".join(f"{part} above it {loss(found['threshold'])}" for part, found in basins.items())
    best = f"Best of any method: {loss(setting['best_loss'])}; {limits}."
    return f"{best}\n\n{markdown_table(head, rows)}"


def _basin(found: Numbers) -> str:
    if found["decades"] is None:
        return "-"
    where = ", ".join(f"{low:.2g} to {high:.2g}" for low, high in found["learning_rates"])
    return f"{'≥ ' * found['at_least']}{found['decades']:.2f}" + (f" ({where})" if where else "")


def _losses(setting: Numbers) -> str:
    curves = setting["curves"]
    rates = sorted({point["learning_rate"] for curve in curves for point in curve["points"]})
    rows = []
    for curve in curves:
        cells = {point["learning_rate"]: _point(point) for point in curve["points"]}
        rows.append([curve["label"], *(cells.get(value, "") for value in rates)])
    return markdown_table(["method", *map(rate, rates)], rows)


def _point(point: Numbers) -> str:
    if not point["diverged"]:
        return band(point["loss"], point["std"])
    total = point["diverged"] + point["seeds"] + point["missing"]
    steps = ", ".join(str(step) for step in point["diverged_at"] if step is not None)
    which = f" ({point['diverged']} of {total})" if total > 1 else ""
    return f"diverged{which}{f' at step {steps}' if steps else ''}"


def _target_section(summary: Numbers) -> str:
    text = (
        "The first evaluation with a loss at or below the target, at the best learning rate of each method: "
        "mean over the seeds that reach it. Seconds are the part of the training time until then, without "
        "start-up. They are as measured: runs that run at the same time share the machine."
    )
    found = _per_setting(summary, _target_tables)
    return f"## Time to a target loss\n\n{text}\n\n{found}" if found else ""


def _target_tables(setting: Numbers) -> str:
    tables = []
    for target in setting["targets"]:
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
        tables += [markdown_table(head, rows)] if rows else []
    return "\n\n".join(tables)


# ---------------------------------------------------------------- particular suites


def paper_section(settings: Mapping[str, Any], curves: Sequence[Curve]) -> str:
    """Our figures and the paper's, with a verdict for each; empty where the suite has none of the paper's.

    Args:
        settings: The suite's ``report``: ``paper`` (mean and std of each method, in nats per token) and
            ``tolerance`` (nats per token, by default 0).
        curves: The curves of all settings.
    """
    if not settings.get("paper"):
        return ""
    tolerance = float(settings.get("tolerance", 0.0))
    text = (
        "Allowed: two standard deviations of the difference, 2 √(std² + std²), plus a tolerance of "
        f"{tolerance:g} nats per token. Fewer than {measures.ENOUGH_SEEDS} seeds at the best learning rate "
        "count as not run."
    )
    table = partial(_paper_table, settings["paper"], tolerance)
    return f"## Comparison with the paper\n\n{text}\n\n{per_setting(by_setting(curves), table)}"


def _paper_table(paper: Mapping[str, Any], tolerance: float, curves: Sequence[Curve]) -> str:
    head = ("method", "ours", "seeds", "learning rate", "paper", "difference", "allowed", "verdict")
    best = {curve.method: curve.best for curve in best_of_each(curves)}
    rows = []
    for method, figures in paper.items():
        try:
            mean, std = float(figures["mean"]), float(figures["std"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"report: paper: {method} is {figures}; it needs a mean and a std, in nats per token"
            ) from None
        point = best.get(method)
        losses = point.losses if point else []
        found = measures.verdict(losses, mean, std, tolerance)
        difference = "-" if found.difference is None else f"{found.difference:+.4f}"
        ours = [method, band(*measures.mean_std(losses)) if losses else "-", str(len(losses)), _at(point)]
        rows.append([*ours, band(mean, std), difference, loss(found.allowed), f"**{found.word}**"])
    return markdown_table(head, rows)


def variants_section(curves: Sequence[Curve]) -> str:
    """The table of the combinations of descent, norms and Momo, lowest loss first."""
    chosen = [curve for curve in curves if curve.variant]
    if not chosen:
        return ""

    def table(members: Sequence[Curve]) -> str:
        head = [name.replace("_", " ") for name in VARIANT_OPTIONS]
        head += ["best loss", "at", "regret at the highest rate"]
        rows = []
        for curve in sorted(members, key=lambda curve: curve.best_loss):
            best, last = curve.best, measures.regret(curve.losses, curve.best_place)[-1]
            found = [loss(best.loss if best else None), _at(best), loss(last)]
            rows.append([*curve.variant, *found])
        return markdown_table(head, rows)

    groups = by_setting(chosen)
    count = max(map(len, groups.values()))
    return f"## The {count} variants, lowest loss first\n\n{per_setting(groups, table)}"


def _at(point: Point | None) -> str:
    return rate(point.learning_rate if point else None)


# ---------------------------------------------------------------- provenance


def _ran_section(summary: Numbers) -> str:
    suite, ran = summary["suite"], summary["ran"]
    counts = ", ".join(f"{ran['states'][state]} {state}" for state in STATES if state in ran["states"])
    facts = {
        **({"Commits": [_pairs(found) for found in ran["commits"]]} if ran.get("commits") else {}),
        "Hardware": [_hardware(found) for found in ran["hardware"]],
        "Versions": [_pairs(found) for found in ran["versions"]],
        "Corpus": [_pairs(found) for found in ran["corpus"]],
        "Parameters": [f"{count:,}" for count in ran["parameters"]],
    }
    lines = [
        f"- Command: `noneuclid sweep --suite {suite['name'].replace('/', ' --task ')}`",
        f"- Runs: {counts}; {ran['missing']} of {ran['wanted']} missing",
        f"- Hours: {ran['hours']:.2f}, summed over the runs whose time is known, start-up included",
        *(f"- {name}: {value}" for name, values in facts.items() for value in values or ["not recorded"]),
        f"- Common options: {_pairs(suite['options'])}",
        *(f"- Options of {method}: {_pairs(flags)}" for method, flags in suite["per_method"].items()),
    ]
    if ran["command"]:
        command = shlex.join(["python", f"recipes/{suite['recipe']}.py", *map(str, ran["command"])])
        lines.append(f"- The first run: `{command}`")
    parts = ["## What was run", "\n".join(lines)]
    if ran["failed"]:
        head = ("method", "options", "learning rate", "seed", "reason")
        parts.append(f"### Failed runs\n\n{markdown_table(head, map(_failed, ran['failed']))}")
    return "\n\n".join(parts)


def _failed(run: Numbers) -> list[str]:
    options = _pairs({**run["method_options"], **run["options"]})
    reason = " ".join(str(run["reason"]).split()).replace("|", "\\|")
    return [run["method"], options, rate(run["learning_rate"]), str(run["seed"]), reason]


def _hardware(found: Numbers) -> str:
    machine = ", ".join(filter(None, (found.get("gpu"), found.get("cpu"))))
    return f"{machine}; threads {found.get('threads', '?')}, processes a run {found.get('processes', '?')}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {as_text(value)}" for name, value in sorted(values.items())) or "-"
