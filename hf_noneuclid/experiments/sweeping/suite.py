"""Suites: the runs of a comparison, as a YAML file in suites/ describes them.

Reading one needs neither torch nor transformers; whether methods, options and flags exist is for
suite_checks.py to say.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.sweeping.suite_file import Scalar, normalise, read_yaml

if TYPE_CHECKING:
    from hf_noneuclid.experiments.sweeping.study import Result

SUITES = Path(__file__).parents[1] / "suites"
DESCRIPTION = ("name", "about", "launch", "report", "hours")  # may change: it stays the same comparison
ROUNDING = 1e-6  # decades: 3e-3 and 3e-2 are within one


@dataclass(frozen=True)
class Run:
    """One training run of a suite.

    Attributes:
        method: value of --optim.
        learning_rate: peak.
        seed: of the initial weights and the order of the data.
        method_options: of --optim_args.
        options: flags of the recipe that vary in the grid.
    """

    method: str
    learning_rate: float
    seed: int
    method_options: Mapping[str, Scalar] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    def from_key(cls, key: str) -> "Run":
        """Return the run of a key."""
        return cls(**json.loads(key))

    @property
    def key(self) -> str:
        """The identity of the run: JSON with sorted keys."""
        return _canonical(asdict(self))

    @property
    def curve(self) -> str:
        """The key without learning rate and seed: runs of one curve are compared over learning rates."""
        rest = {name: value for name, value in asdict(self).items() if name not in ("learning_rate", "seed")}
        return _canonical(rest)

    @property
    def label(self) -> str:
        """The curve in words: the method, then its options and the recipe's, if any."""
        pairs = [*sorted(self.method_options.items()), *sorted(self.options.items())]
        return ", ".join([self.method, *(f"{name}={as_text(value)}" for name, value in pairs)])


@dataclass(frozen=True)
class Suite:
    """A comparison: which runs, of what, and what its report should say.

    Attributes:
        name: of the file.
        about: one sentence.
        recipe: the script that every run starts, without .py.
        options: flags of the recipe for all runs.
        grid: blocks, each a mapping of lists; the suite is the union of their products.
        per_method: flags of the recipe for the runs of a method.
        seeds: of the first pass.
        more_seeds: `seeds` to add `within_decades` of the best learning rate of a curve.
        launch: `processes` a run, `accelerate_config`, `threads` a process.
        report: settings of the report.
        hours: measured cost of the suite, None if nobody did.
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
    hours: float | None
    launch: Mapping[str, Any]

    def runs(self) -> list[Run]:
        """Return the runs of the first pass, in the order in which they are started."""
        return self._with_seeds(self.seeds)

    def possible_runs(self) -> list[Run]:
        """Return every run that may ever be wanted."""
        return list(dict.fromkeys([*self.runs(), *self._with_seeds(self.more_seeds["seeds"])]))

    def wanted(self, results: Iterable["Result"]) -> list[Run]:
        """Return the first pass, and what the results so far call for.

        A curve whose runs of the first pass have all ended gets the further seeds at the learning rates
        within so many decades of its best one, the mean over the seeds of the first pass deciding.
        """
        by_run = {result.run: result for result in results}
        first = self.runs()
        chosen = set(first)
        for runs in _curves(first):
            best = _best_rate(runs, by_run)
            if best is not None:
                reach = self.more_seeds["within_decades"] + ROUNDING
                near = [run for run in runs if abs(math.log10(run.learning_rate / best)) <= reach]
                chosen |= {replace(run, seed=seed) for run in near for seed in self.more_seeds["seeds"]}
        return [run for run in self.possible_runs() if run in chosen]

    def to_dict(self) -> dict[str, Any]:
        """Return the suite as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Suite":
        """Return the suite that `to_dict` gave the values of."""
        return cls(**values)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this comparison and no other, as plain values."""
        return {key: value for key, value in self.to_dict().items() if key not in DESCRIPTION}

    def _with_seeds(self, seeds: Sequence[int]) -> list[Run]:
        points = [point for block in self.grid for point in _product(block)]
        return list(dict.fromkeys(Run(seed=seed, **point) for seed in seeds for point in points))


def load_suite(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite and check its form.

    Args:
        name_or_path: of a file in recipes/suites/, or a path that ends in .yaml.
        overrides: flags of the recipe that replace those of the suite's `options`.

    Raises:
        InputError: there is no such file, or something in it is unknown, missing or of the wrong kind.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
            raise InputError(f"unknown suite {str(name_or_path)!r}: give one of {known}, or a .yaml file")
    values = normalise(read_yaml(path), str(path), overrides or {})
    return Suite(name=path.stem, **values)


def as_text(value: Any) -> str:
    """Write a value as the command line and YAML have it: true, not True."""
    return json.dumps(value) if isinstance(value, bool | dict | list) or value is None else str(value)


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _product(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the points of a block, the learning rate changing fastest."""
    inner = [list(_choices(block[name])) for name in ("method_options", "options")]
    for method, method_options, options, rate in itertools.product(
        block["method"], *inner, block["learning_rate"]
    ):
        yield {
            "method": method,
            "learning_rate": rate,
            "method_options": method_options,
            "options": options,
        }


def _choices(lists: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _curves(runs: Iterable[Run]) -> list[list[Run]]:
    curves: dict[str, list[Run]] = {}
    for run in runs:
        curves.setdefault(run.curve, []).append(run)
    return list(curves.values())


def _best_rate(runs: Sequence[Run], results: Mapping[Run, "Result"]) -> float | None:
    """Return the learning rate of the lowest mean loss, None if a run has not ended or none has a loss."""
    states = [results[run].state if run in results else "waiting" for run in runs]
    if any(state in ("waiting", "running") for state in states):
        return None
    losses: dict[float, list[float]] = {}
    for run, state in zip(runs, states, strict=True):
        loss = results[run].loss if state == "done" else math.inf
        losses.setdefault(run.learning_rate, []).append(loss)
    rate = min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))
    return rate if math.isfinite(sum(losses[rate])) else None
