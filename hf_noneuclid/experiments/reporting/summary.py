"""What a report says in numbers: the content of results.json, from which report.md is written."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_noneuclid.experiments.common import series
from hf_noneuclid.experiments.reporting import comparisons, measures
from hf_noneuclid.experiments.reporting.curves import Curve, Point, build_curves, by_setting, lowest_loss
from hf_noneuclid.experiments.reporting.lower_bounds import lower_bound
from hf_noneuclid.experiments.sweeping.study import Result
from hf_noneuclid.experiments.sweeping.suite import Suite

FINISHED = ("done", "diverged")
STATES = (*FINISHED, "failed", "running", "waiting")
FRACTIONS = (0.05, 0.10)  # above the best of the setting: how far down the basin reaches
FACTORS = (10, 30)  # times a best learning rate
TARGET_DIGITS = 2


def summarise(suite: Suite, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
    """Return everything numeric in the report, as JSON can hold it, and the curves to draw."""
    wanted = suite.wanted(results)
    curves = build_curves(wanted, results)
    summary = {
        "suite": _suite(suite),
        "ran": _ran(curves, results),
        "settings": [_setting(suite, name, members) for name, members in by_setting(curves).items()],
        "batch_size": comparisons.batch_size(curves),
        "runs": [_run(result) for result in results],
    }
    return summary, curves


def _setting(suite: Suite, name: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """Describe the runs that are comparable: those of one setting."""
    best = lowest_loss(curves)
    rows = [_curve(curve, best) for curve in curves]
    return {
        "name": name,
        "options": dict(curves[0].options),
        "best_loss": best,
        "curves": rows,
        "momo_gains": comparisons.momo_gains(rows),
        "targets": _targets(suite, curves),
        "paper": comparisons.paper(suite.report, curves),
        "variants": comparisons.variants(curves),
        "lower_bound": lower_bound(curves),
    }


def _suite(suite: Suite) -> dict[str, Any]:
    names = ("name", "about", "recipe", "options", "per_method", "launch", "report", "hours")
    return {name: getattr(suite, name) for name in names}


def _run(result: Result) -> dict[str, Any]:
    run = result.run
    return {
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "method_options": dict(run.method_options),
        "options": dict(run.options),
        **{name: getattr(result, name) for name in ("state", "loss", "diverged_at", "seconds")},
        "tokens": result.metrics.get("tokens"),
        "steps": result.metrics.get("steps"),
    }


# ------------------------------------------------------------------------------------------ curves


def _curve(curve: Curve, best: float | None) -> dict[str, Any]:
    worst, at_least = measures.robustness(curve.rates, curve.losses, curve.best_place)
    regrets = measures.regret(curve.losses, curve.best_place)
    return {
        "label": curve.label,
        "method": curve.method,
        "method_options": dict(curve.method_options),
        "best": _point(curve.best) if curve.best else None,
        "basins": {} if best is None else {f"{f:.0%}": _basin(curve, best, f) for f in FRACTIONS},
        "robustness": {"regret": worst, "at_least": at_least},
        "regret_at_factor": {str(factor): _regret_at(curve, factor) for factor in FACTORS},
        "points": [
            {**_point(point), "regret": value} for point, value in zip(curve.points, regrets, strict=True)
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    """Describe a learning rate; a mean that is infinite because a seed diverged is none in JSON."""
    mean, std = measures.mean_std(point.losses) if point.done else (None, None)
    return {
        "learning_rate": point.learning_rate,
        "loss": None if point.diverged else mean,
        "std": std,
        "lowest": min(point.losses, default=None),
        "highest": max(point.losses, default=None),
        "seeds": len(point.done),
        "diverged": len(point.diverged),
        "diverged_at": [result.diverged_at for result in point.diverged],
        "missing": point.missing,
    }


def _basin(curve: Curve, best: float, fraction: float) -> dict[str, Any]:
    """Describe the basin; a curve of which no run has ended has one of unknown width."""
    threshold = measures.within(best, fraction)
    found = measures.basin(curve.rates, curve.losses, threshold)
    known = any(value is not None for value in curve.losses)
    return {
        "threshold": threshold,
        "decades": found.width if known else None,
        "at_least": found.at_least,
        "learning_rates": [list(interval) for interval in found.intervals],
    }


def _regret_at(curve: Curve, factor: float) -> float | None:
    """Return the regret at a multiple of the best learning rate, None where the grid does not have it."""
    if curve.best is None:
        return None
    index = measures.nearest(curve.rates, factor * curve.best.learning_rate)
    return None if index is None else measures.regret(curve.losses, curve.best_place)[index]


# ----------------------------------------------------------------------------------------- targets


def _targets(suite: Suite, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    targets = suite.report.get("target_losses") or _common_target(curves)
    return [
        {"loss": target, "curves": [_way(curve, target) for curve in curves if curve.best]}
        for target in targets
    ]


def _common_target(curves: Sequence[Curve]) -> list[float]:
    """Return the loss that all methods reach at their best, by the evaluations along the way, rounded up."""
    lowest = [
        min(losses)
        for curve in curves
        for result in (curve.best.done if curve.best else ())
        if (losses := [loss for loss in series(result.history, "eval_loss")[1] if math.isfinite(loss)])
    ]
    return [math.ceil(max(lowest) * 10**TARGET_DIGITS) / 10**TARGET_DIGITS] if lowest else []


def _way(curve: Curve, target: float) -> dict[str, Any]:
    """Describe the way to a target loss at the best learning rate: means over the seeds that reach it."""
    done = curve.best.done
    reached = [
        (result, step) for result in done if (step := measures.steps_to(result.history, target)) is not None
    ]
    seconds = [value for result, step in reached if (value := _seconds_to(result, step)) is not None]
    return {
        "label": curve.label,
        "seeds": len(done),
        "reached": len(reached),
        "steps": measures.mean_std([step for _, step in reached])[0] if reached else None,
        "seconds": measures.mean_std(seconds)[0] if len(seconds) == len(reached) > 0 else None,
    }


def _seconds_to(result: Result, step: int) -> float | None:
    """Return the part of the training time that the steps took, evaluations included, start-up not."""
    runtimes = [row["train_runtime"] for row in result.history if "train_runtime" in row]
    steps = result.metrics.get("steps")
    if not runtimes or not steps or result.metrics.get("resumed_from"):  # known for a part of the run alone
        return None
    return runtimes[-1] * step / steps


# -------------------------------------------------------------------------------------- provenance


def _ran(curves: Sequence[Curve], results: Sequence[Result]) -> dict[str, Any]:
    """Say what was run, on what, and what of it is missing."""
    states = Counter(result.state for result in results)
    failed = [result for result in results if result.state == "failed"]
    measured = [result.seconds for result in results if result.seconds is not None]
    wanted = sum(len(p.done) + len(p.diverged) + p.missing for curve in curves for p in curve.points)
    return {
        "wanted": wanted,
        "states": {name: states[name] for name in STATES if states[name]},
        "missing": wanted - sum(states[name] for name in FINISHED),
        "failed": [
            {**_run(result), "reason": result.metrics.get("reason") or "no reason recorded"}
            for result in failed
        ],
        "hours": sum(measured) / 3600,
        **{name: _different(results, name) for name in ("versions", "hardware", "corpus", "parameters")},
        "command": next((c for r in results if (c := _command(r.metrics))), None),
    }


def _different(results: Sequence[Result], name: str) -> list[Any]:
    """Return the different values that the runs' metrics have, in the order of the runs."""
    values: list[Any] = []
    for result in results:
        value = result.metrics.get(name)
        if value is not None and value not in values:
            values.append(value)
    return values


def _command(metrics: dict[str, Any]) -> list[str] | None:
    """Return the arguments of a run without its output folder, which is of no use to anyone else."""
    arguments = metrics.get("command")
    if not arguments:
        return None
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--output_dir" and not argument.startswith("--output_dir="):
            kept.append(argument)
        skip = argument == "--output_dir"
    return kept
