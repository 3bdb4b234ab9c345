"""Suites: the runs of a comparison, as a YAML file in recipes/suites/ describes them.

Reading a suite imports neither torch nor transformers. ``suite_checks`` says whether the methods, options and
files that it names exist.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_noneuclid.experiments.common import InputError, recipes_folder, require
from hf_noneuclid.experiments.sweeping.suite_file import read_suites

DESCRIPTION = ("name", "about", "launch", "report")  # may change without making it another comparison
ROUNDING = 1e-6  # decades: 3e-3 and 3e-2 are within one

State = Literal["done", "diverged", "failed", "refused", "running", "waiting"]


@dataclass(frozen=True)
class Run:
    """One training run of a suite.

    Attributes:
        method: Value of ``--optim``.
        learning_rate: Peak of the schedule.
        seed: Of the initial weights and the order of the data.
        method_options: Pairs of ``--optim_args``.
        options: Flags of the recipe that vary in the grid.
    """

    method: str
    learning_rate: float
    seed: int
    method_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def from_key(cls, key: str) -> Run:
        """The run that has this key."""
        return cls(**json.loads(key))

    @property
    def key(self) -> str:
        """The identity of the run: JSON with sorted keys."""
        return canonical(asdict(self))

    @property
    def curve(self) -> str:
        """The identity without learning rate and seed, which is the same for all points of a curve."""
        return canonical([self.method, self.method_options, self.options])

    @property
    def label(self) -> str:
        """The curve in words: the method, then the options of the method and of the recipe."""
        pairs = [*sorted(self.method_options.items()), *sorted(self.options.items())]
        return ", ".join([self.method, *(f"{name}={as_text(value)}" for name, value in pairs)])

    def __str__(self) -> str:
        return f"{self.label}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """The state of a run, and its outcome once it has ended.

    Attributes:
        run: The run.
        state: ``done`` and ``diverged`` are results. ``refused``: the recipe did not accept its input.
        loss: Final validation loss in nats per token, where the state is ``done``.
        diverged_at: First step that was not finite, where the run diverged and the step is known.
        seconds: Wall clock with start-up; None where the run was resumed.
        metrics: The content of metrics.json; where the run failed, its ``reason``.
        history: The Trainer's log history.
    """

    run: Run
    state: State
    loss: float | None = None
    diverged_at: int | None = None
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """A comparison: the runs, and what its report should say.

    Attributes:
        name: Name of the file; ``file/task`` for a task of it.
        about: One sentence.
        recipe: The script that every run starts, without .py.
        options: Flags of the recipe for all runs.
        grid: Blocks, each a mapping of lists; the suite is the union of their products. A block may also have
            ``flags`` of the recipe for its runs, the ``column`` of the report's table in which they stand,
            and ``more_seeds: false``.
        per_method: Flags of the recipe for the runs of a method.
        seeds: Seeds of the first pass.
        more_seeds: ``seeds`` that are added ``within_decades`` of the best learning rate of a curve.
        launch: ``processes`` of a run, ``accelerate_config``, ``threads`` of a process.
        report: Settings of the report.
        more_rates: Learning rates that may follow, one after the other, beyond an end of the grid at which
            the best one lies.
        start: Flags of pretrain.py for the model that every run starts from; empty without one.
    """

    name: str
    about: str
    recipe: str
    options: Mapping[str, Any]
    grid: Sequence[Mapping[str, Any]]
    per_method: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    more_seeds: Mapping[str, Any]
    report: Mapping[str, Any]
    launch: Mapping[str, Any]
    more_rates: int = 0
    start: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The name of the task; empty for a suite without tasks."""
        return self.name.partition("/")[2]

    def runs(self) -> list[Run]:
        """The runs of the first pass, in the order in which they start."""
        return _with_seeds(self.grid, self.seeds)

    def possible_runs(self) -> list[Run]:
        """Every run that may ever be wanted."""
        seeds, more = self.seeds, self.more_seeds["seeds"]
        kept = [block for block in self.grid if block.get("more_seeds", True)]
        first = [*self.runs(), *_with_seeds(self.grid, seeds, self.more_rates)]
        later = [*_with_seeds(kept, more), *_with_seeds(kept, more, self.more_rates)]
        return list(dict.fromkeys([*first, *later]))

    def wanted(self, results: Iterable[Result]) -> list[Run]:
        """The first pass, and the further seeds that the results so far call for.

        When all runs of a curve in the first pass have ended, a learning rate is added if the best one is at
        an end, and then the further seeds at the learning rates near the best one. The mean over the seeds of
        the first pass decides which is the best.
        """
        by_run = {result.run: result for result in results}
        curves: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs():
            curves[run.curve].append(run)
        chosen = set[Run]()
        for first in curves.values():
            runs = self._grown(first, by_run)
            chosen |= {*runs}
            best = _best_rate(runs, by_run)
            if best is not None:
                reach = self.more_seeds["within_decades"] + ROUNDING
                near = [run for run in runs if abs(math.log10(run.learning_rate / best)) <= reach]
                chosen |= {replace(run, seed=seed) for run in near for seed in self.more_seeds["seeds"]}
        return [run for run in self.possible_runs() if run in chosen]

    def block_of(self, run: Run) -> Mapping[str, Any]:
        """The first block of the grid that has the curve of a run; empty if none has."""

        def holds(lists: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
            return lists.keys() == values.keys() and all(values[key] in lists[key] for key in lists)

        for block in self.grid:
            options = ("method_options", "options")
            if run.method in block["method"] and all(holds(block[k], getattr(run, k)) for k in options):
                return block
        return {}

    def _grown(self, runs: list[Run], by_run: Mapping[Run, Result]) -> list[Run]:
        """The first pass of a curve, with learning rates beyond the end at which the best one lies."""
        for _ in range(self.more_rates):
            rates, best = sorted({run.learning_rate for run in runs}), _best_rate(runs, by_run)
            if best not in (rates[0], rates[-1]) or len(rates) < 3:
                break
            further = _beyond(rates if best == rates[0] else rates[::-1])
            runs = [*runs, *(replace(runs[0], learning_rate=further, seed=seed) for seed in self.seeds)]
        return runs

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this comparison from others, as plain values."""
        return {key: value for key, value in asdict(self).items() if key not in DESCRIPTION}


def load_suites(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, task: str | None = None
) -> list[Suite]:
    """Reads a suite, or the tasks of one that has several, and checks their form.

    A suite without tasks is a list of one.

    Args:
        name_or_path: Name of a file in recipes/suites/, or a path that ends in .yaml.
        overrides: Flags of the recipe that replace those of the suite's ``options``.
        task: Only this task.

    Raises:
        InputError: There is no such file, or something in it is unknown, missing or of the wrong type.
    """
    path, suites = Path(name_or_path), recipes_folder() / "suites"
    if path.suffix not in (".yaml", ".yml"):
        path = suites / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in suites.glob("*.yaml")))
            raise InputError(f"unknown suite {str(name_or_path)!r}: give one of {known}, or a .yaml file")
    found = [Suite(name=name, **values) for name, values in read_suites(path, overrides or {}).items()]
    chosen = [suite for suite in found if task in (None, suite.task)]
    known = ", ".join(suite.task for suite in found if suite.task) or "none"
    require(chosen, f"suite {path}: there is no task {task!r}; its tasks: {known}")
    return chosen


def as_text(value: Any) -> str:
    """A value as the command line and YAML write it: true, not True."""
    return json.dumps(value) if isinstance(value, bool | dict | list) or value is None else str(value)


def canonical(values: Any) -> str:
    """The same JSON for the same values, whatever the order of their keys."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _with_seeds(grid: Sequence[Mapping[str, Any]], seeds: Sequence[int], further: int = 0) -> list[Run]:
    """The runs of the blocks, with so many further learning rates at both ends."""
    points = [point for block in grid for point in _product(block, further)]
    return list(dict.fromkeys(Run(seed=seed, **point) for seed in seeds for point in points))


def _beyond(rates: Sequence[float]) -> float:
    """The learning rate before the first one: 0.3 before 1, 3, 10, and 30 before 10, 3, 1."""
    return float(f"{rates[0] * rates[1] / rates[2]:.3g}")


def _product(block: Mapping[str, Any], further: int = 0) -> list[dict[str, Any]]:
    """The points of a block; the learning rate changes fastest."""
    rates = list(block["learning_rate"])
    for _ in range(further if len(rates) > 2 else 0):
        rates = [_beyond(sorted(rates)), *rates, _beyond(sorted(rates)[::-1])]

    def choices(name: str) -> list[dict[str, Any]]:
        lists = block[name]
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]

    names = ("method", "method_options", "options", "learning_rate")
    axes = (block["method"], choices("method_options"), choices("options"), rates)
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*axes)]


def _best_rate(runs: Sequence[Run], by_run: Mapping[Run, Result]) -> float | None:
    """The learning rate of the lowest mean loss; None if a run has not ended, or none has a loss."""
    results = [by_run.get(run, Result(run, "waiting")) for run in runs]
    if any(result.state in ("waiting", "running") for result in results):
        return None
    losses: dict[float, list[float]] = defaultdict(list)
    for result in results:
        losses[result.run.learning_rate].append(math.inf if result.loss is None else result.loss)
    rate = min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))
    return rate if math.isfinite(sum(losses[rate])) else None
