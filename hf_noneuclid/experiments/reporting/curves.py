"""The runs of a suite as curves: final loss against learning rate for each method and its options."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hf_noneuclid.experiments.reporting.measures import best_index
from hf_noneuclid.experiments.reporting.tables import option_words, setting_names
from hf_noneuclid.experiments.sweeping.suite import Result, Run, canonical

VARIANT_OPTIONS = ("descent", "product_norm", "vector_norm", "step_size")


@dataclass(frozen=True)
class Point:
    """The runs at one learning rate, one for each seed.

    Attributes:
        learning_rate: Peak of the schedule.
        done: Runs that ended with a finite loss.
        diverged: Runs that diverged.
        missing: Number of runs that have not ended, or that failed.
    """

    learning_rate: float
    done: tuple[Result, ...]
    diverged: tuple[Result, ...]
    missing: int

    @property
    def loss(self) -> float | None:
        """Mean over seeds in nats per token; infinite if one of them diverged; None before one ends."""
        if self.diverged:
            return math.inf
        return fmean(self.losses) if self.done else None

    @property
    def losses(self) -> list[float]:
        """The final losses of the seeds that have one, in nats per token."""
        return [result.loss for result in self.done if result.loss is not None]

    @property
    def is_finite(self) -> bool:
        """Whether the point has a mean that can be drawn."""
        return bool(self.done) and not self.diverged


@dataclass(frozen=True)
class Curve:
    """A method with its options, over learning rates.

    Attributes:
        method: Value of ``--optim``.
        method_options: Options of the method that vary in the suite.
        options: Options of the recipe that vary. Curves are comparable where these are the same.
        points: One for each learning rate, rising.
        setting: Short name of ``options``; empty if the suite has a single setting.
    """

    method: str
    method_options: Mapping[str, Any]
    options: Mapping[str, Any]
    points: tuple[Point, ...]
    setting: str = ""

    @property
    def label(self) -> str:
        """The method and those of its options that vary, without the setting."""
        return ", ".join([self.method, *option_words(self.method_options)])

    @property
    def step_size(self) -> str:
        """What bounds the step size, as far as the name and the options tell."""
        named = self.method.endswith("_momo") or self.method.startswith("momo_")
        return str(self.method_options.get("step_size", "momo" if named else "rate"))

    @property
    def momo(self) -> bool:
        """Whether Momo bounds the step size."""
        return "momo" in self.step_size

    @property
    def variant(self) -> tuple[str, ...]:
        """The four choices that make a method if all of them vary in the suite; otherwise empty."""
        values = [str(self.method_options.get(name)) for name in VARIANT_OPTIONS]
        return tuple(values) if {*VARIANT_OPTIONS} <= self.method_options.keys() else ()

    @property
    def family(self) -> str:
        """The method without Momo; both have the same colour."""
        name = self.method.removeprefix("momo_").removesuffix("_momo")
        return "muon" if name == "muonadam" else name

    @property
    def rates(self) -> list[float]:
        """The learning rates, rising."""
        return [point.learning_rate for point in self.points]

    @property
    def losses(self) -> list[float | None]:
        """The mean final loss at each: infinite where a seed diverged, None where no run has ended."""
        return [point.loss for point in self.points]

    @property
    def best_place(self) -> int | None:
        """The place of the lowest mean final loss among the points with the most seeds: one may be lucky."""
        most = max((len(point.done) for point in self.points if not point.diverged), default=0)
        return best_index([point.loss if len(point.done) == most else None for point in self.points])

    @property
    def best(self) -> Point | None:
        """The point of the lowest mean final loss."""
        return None if self.best_place is None else self.points[self.best_place]

    @property
    def best_loss(self) -> float:
        """Its loss in nats per token; infinite without one."""
        return math.inf if self.best is None or self.best.loss is None else self.best.loss


def build_curves(wanted: Sequence[Run], results: Sequence[Result]) -> list[Curve]:
    """The curves of a suite by setting, and by method as the suite orders them.

    ``wanted`` are all runs of the suite; a run that has no result is missing.
    """
    by_run = {result.run: result for result in results}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in dict.fromkeys([*wanted, *by_run]):
        groups[run.curve].append(run)
    firsts = [runs[0] for runs in groups.values()]
    methods = list(dict.fromkeys(run.method for run in firsts))
    shown = set[str]()
    for method in methods:  # its name says the options that it always has: only those that vary are shown
        shown |= _varying([run.method_options for run in firsts if run.method == method])
    of_recipe = _varying([run.options for run in firsts])
    settings = {canonical(run.options): _part(run.options, of_recipe) for run in firsts}
    names = dict(zip(settings, setting_names(list(settings.values())), strict=True))
    curves = []
    for first, runs in zip(firsts, groups.values(), strict=True):
        setting = canonical(first.options)
        options = _part(first.method_options, shown), settings[setting]
        curves.append(Curve(first.method, *options, tuple(points_of(runs, by_run)), names[setting]))
    order = list(names.values())
    return sorted(curves, key=lambda c: (order.index(c.setting), methods.index(c.method)))


def points_of(runs: Sequence[Run], by_run: Mapping[Run, Result]) -> Iterable[Point]:
    """The points of a curve from all of its runs."""
    for rate in sorted({run.learning_rate for run in runs}):
        seeds = sorted((run for run in runs if run.learning_rate == rate), key=lambda run: run.seed)
        found = [by_run[run] for run in seeds if run in by_run]
        done, diverged = (tuple(r for r in found if r.state == state) for state in ("done", "diverged"))
        yield Point(rate, done, diverged, len(seeds) - len(done) - len(diverged))


def _varying(mappings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys whose values differ. A missing key differs from every value."""
    keys = {key for mapping in mappings for key in mapping}
    return {key for key in keys if len({canonical(mapping.get(key)) for mapping in mappings}) > 1}


def _part(options: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in sorted(options.items()) if key in names}


def by_setting(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """The curves that are comparable with each other, by the name of their setting."""
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.setting].append(curve)
    return dict(groups)


def best_of_each(curves: Iterable[Curve]) -> list[Curve]:
    """The best curve of each method over its options, for curves of one setting."""
    best: dict[tuple[str, bool], Curve] = {}
    for curve in curves:
        known = best.setdefault((curve.method, curve.momo), curve)
        if curve.best_loss < known.best_loss:
            best[curve.method, curve.momo] = curve
    return [curve for curve in best.values() if curve.best]


def mean_series(results: Sequence[Result], key: str) -> tuple[list[int], list[float]]:
    """The steps that all log histories have, and the mean over runs of one key there."""
    runs = [{row["step"]: row[key] for row in run.history if row.get(key) is not None} for run in results]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return steps, [fmean(run[step] for run in runs) for step in steps]
