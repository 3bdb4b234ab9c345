"""The runs of a suite put together: final loss against learning rate for each method and its options."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from hf_noneuclid.experiments.reporting.bounds import bound_order, in_words
from hf_noneuclid.experiments.reporting.measures import best_index
from hf_noneuclid.experiments.reporting.settings import setting_names
from hf_noneuclid.experiments.sweeping.study import Result
from hf_noneuclid.experiments.sweeping.suite import Run


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
        options: options of the recipe that do. Curves are comparable where these are the same.
        points: one for each learning rate, rising.
        setting: short name of `options`; empty if the suite has a single setting.
    """

    method: str
    method_options: Mapping[str, Any]
    options: Mapping[str, Any]
    points: tuple[Point, ...]
    setting: str = ""

    @property
    def label(self) -> str:
        """The method and those of its options that vary, without the setting."""
        return ", ".join([self.method, *in_words(self.method_options)])

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
    def best_place(self) -> int | None:
        """Which of the points with the most seeds has the lowest mean final loss: one seed may be lucky."""
        finite = [point for point in self.points if not point.diverged]
        most = max((len(point.done) for point in finite), default=0)
        return best_index([point.loss if len(point.done) == most else None for point in self.points])

    @property
    def best(self) -> Point | None:
        """The point there."""
        return None if self.best_place is None else self.points[self.best_place]


def build_curves(wanted: Sequence[Run], results: Sequence[Result]) -> list[Curve]:
    """Return the curves of a suite, those of a setting together, in the order of its runs otherwise.

    Args:
        wanted: all runs of the suite; those without a result are missing.
        results: one for each run that has any.
    """
    by_key = {result.run.key: result for result in results}
    runs = list({run.key: run for run in [*wanted, *(result.run for result in results)]}.values())
    of_methods, of_recipe = _what_varies_for_a_method(runs), _what_varies([run.options for run in runs])
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.curve].append(run)
    found = [_curve(group, by_key, of_methods, of_recipe) for group in groups.values()]
    settings = {_canonical(curve.options): curve.options for curve in found}
    names = dict(zip(settings, setting_names(list(settings.values())), strict=True))
    named = [replace(curve, setting=names[_canonical(curve.options)]) for curve in found]
    return _in_order(named)


def _in_order(curves: Sequence[Curve]) -> list[Curve]:
    """Sort by setting, then by method, both as the suite has them, then by lower bound."""
    settings, methods = list(by_setting(curves)), methods_of(curves)

    def place(curve: Curve) -> tuple[Any, ...]:
        where = settings.index(curve.setting), methods.index(curve.method)
        return *where, bound_order(curve.method_options)

    return sorted(curves, key=place)


def _curve(
    runs: Sequence[Run], by_key: Mapping[str, Result], of_methods: set[str], of_recipe: set[str]
) -> Curve:
    first, rates = runs[0], sorted({run.learning_rate for run in runs})
    points = [_point(rate, [run for run in runs if run.learning_rate == rate], by_key) for rate in rates]
    method_options, options = (
        {key: value for key, value in sorted(values.items()) if key in varying}
        for values, varying in ((first.method_options, of_methods), (first.options, of_recipe))
    )
    return Curve(first.method, method_options, options, tuple(points))


def _point(rate: float, runs: Iterable[Run], by_key: Mapping[str, Result]) -> Point:
    found = [by_key.get(run.key) for run in sorted(runs, key=lambda run: run.seed)]
    done = tuple(result for result in found if result and result.state == "done")
    diverged = tuple(result for result in found if result and result.state == "diverged")
    return Point(rate, done, diverged, len(found) - len(done) - len(diverged))


def _what_varies_for_a_method(runs: Sequence[Run]) -> set[str]:
    """Return the method options that vary for some method: its name says those that it always has."""
    options: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        options[run.method].append(run.method_options)
    return set().union(*map(_what_varies, options.values()))


def _what_varies(mappings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that do not have the same value everywhere; not to be there is a value, too."""
    keys = {key for mapping in mappings for key in mapping}
    return {key for key in keys if len({_canonical(mapping.get(key)) for mapping in mappings}) > 1}


def by_setting(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Return the curves that are comparable with each other, by the name of their setting."""
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.setting].append(curve)
    return dict(groups)


def lowest_loss(curves: Iterable[Curve]) -> float | None:
    """Return the best loss of any curve, in nats per token; None before one has any."""
    return min((curve.best.loss for curve in curves if curve.best), default=None)


def methods_of(curves: Iterable[Curve]) -> list[str]:
    """Return the methods in the order of the suite."""
    return list(dict.fromkeys(curve.method for curve in curves))


def best_of_each(curves: Iterable[Curve]) -> list[Curve]:
    """Return each method's best curve over its options; the curves are of one setting."""
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


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
