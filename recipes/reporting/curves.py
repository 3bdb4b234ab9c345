"""The runs of a suite put together: final loss against learning rate for each method and its options."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from reporting.measures import best_index
from sweeping.study import Result
from sweeping.suite import Run, as_text


@dataclass(frozen=True)
class Point:
    """The runs at one learning rate: one for each seed.

    Attributes:
        learning_rate: peak of the schedule.
        done: runs that ended with a finite loss.
        diverged: runs that did not.
        missing: runs that have neither ended nor diverged yet, or that failed.
    """

    learning_rate: float
    done: tuple[Result, ...]
    diverged: tuple[Result, ...]
    missing: int

    @property
    def loss(self) -> float | None:
        """Mean over seeds in nats per token; infinite if any of them diverged; None before one ends."""
        if self.diverged:
            return math.inf
        return fmean(self.losses) if self.done else None

    @property
    def losses(self) -> list[float]:
        """The final losses of the seeds that have one, in nats per token."""
        return [result.loss for result in self.done]


@dataclass(frozen=True)
class Curve:
    """A method with its options, over learning rates.

    Attributes:
        method: value of --optim.
        method_options: options of the method that vary in the suite.
        options: options of the recipe that do.
        points: one for each learning rate, rising.
    """

    method: str
    method_options: Mapping[str, Any]
    options: Mapping[str, Any]
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The method, and what varies."""
        return ", ".join([self.method, *_settings(self.method_options), *_settings(self.options)])

    @property
    def setting(self) -> str:
        """What varies, without the method."""
        return ", ".join([*_settings(self.method_options), *_settings(self.options)])

    @property
    def momo(self) -> bool:
        """Whether the step size is Momo's."""
        named = self.method.endswith("_momo") or self.method.startswith("momo_")
        return named or str(self.method_options.get("momo", False)).lower() == "true"

    @property
    def family(self) -> str:
        """The method without Momo, which shares its colour."""
        name = self.method.removeprefix("momo_").removesuffix("_momo")
        return "muon" if name == "muonadam" else name

    @property
    def rates(self) -> list[float]:
        """The learning rates, rising."""
        return [point.learning_rate for point in self.points]

    @property
    def losses(self) -> list[float | None]:
        """The mean final loss at each: infinite where a seed diverged, None where none has ended."""
        return [point.loss for point in self.points]

    @property
    def best(self) -> Point | None:
        """The point with the lowest mean final loss."""
        index = best_index(self.losses)
        return None if index is None else self.points[index]


def build_curves(wanted: Sequence[Run], results: Sequence[Result]) -> list[Curve]:
    """Return the curves of a suite in the order of its runs.

    Args:
        wanted: all runs of the suite; those without a result are missing.
        results: one for each run that has any.
    """
    by_key = {result.run.key: result for result in results}
    runs = list({run.key: run for run in [*wanted, *(result.run for result in results)]}.values())
    varying = _what_varies(runs)
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.curve].append(run)
    return [_curve(group, by_key, varying) for group in groups.values()]


def _curve(runs: Sequence[Run], by_key: Mapping[str, Result], varying: set[str]) -> Curve:
    first, rates = runs[0], sorted({run.learning_rate for run in runs})
    points = [_point(rate, [run for run in runs if run.learning_rate == rate], by_key) for rate in rates]
    method_options, options = (
        {key: value for key, value in sorted(values.items()) if key in varying}
        for values in (first.method_options, first.options)
    )
    return Curve(first.method, method_options, options, tuple(points))


def _point(rate: float, runs: Iterable[Run], by_key: Mapping[str, Result]) -> Point:
    found = [by_key.get(run.key) for run in sorted(runs, key=lambda run: run.seed)]
    done = tuple(result for result in found if result and result.state == "done")
    diverged = tuple(result for result in found if result and result.state == "diverged")
    return Point(rate, done, diverged, len(found) - len(done) - len(diverged))


def _what_varies(runs: Sequence[Run]) -> set[str]:
    """Return the options that have several values for the same method; a method may have none of them."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    keys = {key for run in runs for key in (*run.method_options, *run.options)}
    for run in runs:
        values = {**run.method_options, **run.options}
        for key in keys:
            seen[run.method, key].add(json.dumps(values.get(key)))
    return {key for (_, key), values in seen.items() if len(values) > 1}


def best_of_each(curves: Iterable[Curve]) -> list[Curve]:
    """Return each method's best curve: with several settings of its options, the lowest."""
    best: dict[tuple[str, bool], Curve] = {}
    for curve in curves:
        place = (curve.method, curve.momo)
        if curve.best and (place not in best or curve.best.loss < best[place].best.loss):
            best[place] = curve
    return list(best.values())


def mean_series(results: Iterable[Result], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the mean over runs of one key of their log histories, where all have it."""
    runs = [{row["step"]: row[key] for row in run.history if row.get(key) is not None} for run in results]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return steps, [fmean(run[step] for run in runs) for step in steps]


def _settings(options: Mapping[str, Any]) -> list[str]:
    return [f"{key}={as_text(value)}" for key, value in options.items()]
