"""The numbers of a report: the content of results.json, from which report.md is written."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_noneuclid.experiments.common import series
from hf_noneuclid.experiments.reporting import measures
from hf_noneuclid.experiments.reporting.curves import Curve, Point, build_curves, by_setting
from hf_noneuclid.experiments.sweeping.suite import Result, Run, Suite

FINISHED = ("done", "diverged")
STATES = (*FINISHED, "failed", "running", "waiting")
FRACTIONS = (0.05, 0.10)  # above the best of the setting: the limits of the basin
TARGET_DIGITS = 2
OF_RUN = ("method", "learning_rate", "seed", "method_options", "options")
OF_RESULT = ("state", "loss", "diverged_at", "seconds")
OF_METRICS = ("tokens", "steps")
OF_SUITE = ("name", "about", "recipe", "options", "per_method", "launch", "report")


def summarise(suite: Suite, results: Sequence[Result]) -> tuple[dict[str, Any], list[Curve]]:
    """Everything numeric in the report, as JSON can hold it, and the curves to draw."""
    curves = build_curves(suite.wanted(results), results)
    summary = {
        "suite": {name: getattr(suite, name) for name in OF_SUITE},
        "ran": _ran(curves, results),
        "settings": [_setting(suite, name, members) for name, members in by_setting(curves).items()],
        "runs": [_run(result) for result in results],
    }
    return summary, curves


def restore(stored: dict[str, Any]) -> tuple[dict[str, Any], list[Curve]]:
    """The summary and curves of a results.json.

    The measures are computed again from its runs. Targets and facts of the runs are copied, because they need
    histories and metrics that the file does not hold.
    """
    suite = Suite(**stored["suite"], grid=[], seeds=[], more_seeds={"seeds": [], "within_decades": 0.0})
    summary, curves = summarise(suite, results_of(stored["runs"]))
    for setting, known in zip(summary["settings"], stored["settings"], strict=True):
        setting["targets"] = known["targets"]
    return {**summary, "ran": stored["ran"]}, curves


def results_of(rows: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The results that a results.json holds, without histories."""
    return [
        Result(
            Run(**{name: row[name] for name in OF_RUN}),
            **{name: row[name] for name in OF_RESULT},
            metrics={name: row[name] for name in (*OF_METRICS, "commit") if name in row},
        )
        for row in rows
    ]


def _run(result: Result) -> dict[str, Any]:
    return {
        **{name: getattr(result.run, name) for name in OF_RUN},
        **{name: getattr(result, name) for name in OF_RESULT},
        **{name: result.metrics.get(name) for name in OF_METRICS},
        **({"commit": result.metrics["commit"]} if "commit" in result.metrics else {}),
    }


# ---------------------------------------------------------------- curves


def _setting(suite: Suite, name: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """The numbers of comparable runs: those of one setting."""
    best = min((curve.best_loss for curve in curves if curve.best), default=None)
    return {
        "name": name,
        "options": dict(curves[0].options),
        "best_loss": best,
        "curves": [_curve(curve, best) for curve in curves],
        "targets": _targets(suite, curves),
    }


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
        "points": [
            {**_point(point), "regret": value} for point, value in zip(curve.points, regrets, strict=True)
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    """The numbers of a learning rate. The mean is None where a seed diverged."""
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
    """The basin of a curve; its width is None if no run has ended."""
    threshold = best + fraction * abs(best)
    found = measures.basin(curve.rates, curve.losses, threshold)
    known = any(value is not None for value in curve.losses)
    return {
        "threshold": threshold,
        "decades": found.width if known else None,
        "at_least": found.at_least,
        "learning_rates": [list(interval) for interval in found.intervals],
    }


# ---------------------------------------------------------------- targets


def _targets(suite: Suite, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The steps and seconds to each target loss, at the best learning rate of each curve."""
    done = {curve.label: curve.best.done for curve in curves if curve.best}
    targets = suite.report.get("target_losses") or _common_target(list(done.values()))
    return [{"loss": target, "curves": [_way(*item, target) for item in done.items()]} for target in targets]


def _common_target(best: Sequence[Sequence[Result]]) -> list[float]:
    """The lowest loss that all runs reach in their evaluations along the way, rounded up."""
    evaluations = [series(result.history, "eval_loss")[1] for results in best for result in results]
    lowest = [min(finite) for losses in evaluations if (finite := [x for x in losses if math.isfinite(x)])]
    return [math.ceil(max(lowest) * 10**TARGET_DIGITS) / 10**TARGET_DIGITS] if lowest else []


def _way(label: str, done: Sequence[Result], target: float) -> dict[str, Any]:
    """The way to a target loss: means over the seeds that reach it."""
    steps = [(run, step) for run in done if (step := measures.steps_to(run.history, target)) is not None]
    seconds = [value for run, step in steps if (value := _seconds_to(run, step)) is not None]
    return {
        "label": label,
        "seeds": len(done),
        "reached": len(steps),
        "steps": measures.mean_std([step for _, step in steps])[0] if steps else None,
        "seconds": measures.mean_std(seconds)[0] if seconds and len(seconds) == len(steps) else None,
    }


def _seconds_to(result: Result, step: int) -> float | None:
    """The part of the training time that the steps took, with evaluations and without start-up."""
    runtimes = [row["train_runtime"] for row in result.history if "train_runtime" in row]
    steps = result.metrics.get("steps")
    if not runtimes or not steps or result.metrics.get("resumed_from"):  # the time of a part of the run only
        return None
    return float(runtimes[-1] * step / steps)


# ---------------------------------------------------------------- provenance


def _ran(curves: Sequence[Curve], results: Sequence[Result]) -> dict[str, Any]:
    """What was run, on what, and what is missing."""
    states = Counter[str](result.state for result in results)
    wanted = sum(len(p.done) + len(p.diverged) + p.missing for curve in curves for p in curve.points)
    failed = [result for result in results if result.state == "failed"]
    commands = (_command(result.metrics.get("command") or []) for result in results)
    return {
        "wanted": wanted,
        "states": {name: states[name] for name in STATES if states[name]},
        "missing": wanted - states["done"] - states["diverged"],
        "failed": [
            {**_run(result), "reason": result.metrics.get("reason") or "no reason recorded"}
            for result in failed
        ],
        "hours": sum(result.seconds for result in results if result.seconds is not None) / 3600,
        **{name: _different(results, name) for name in ("versions", "hardware", "corpus", "parameters")},
        "commits": _different(results, "commit"),
        "command": next(filter(None, commands), None),
    }


def _different(results: Sequence[Result], name: str) -> list[Any]:
    """The different values of one of the runs' metrics, in the order of the runs."""
    values: list[Any] = []
    for result in results:
        value = result.metrics.get(name)
        if value is not None and value not in values:
            values.append(value)
    return values


def _command(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run without its output folder, which nobody else has."""
    before = ["", *arguments]
    return [
        argument
        for argument, previous in zip(arguments, before, strict=False)
        if "--output_dir" not in (previous, argument.partition("=")[0])
    ]
