"""The report of a suite with tasks: how each method does on every task, beside the same method tuned.

The blocks of such a suite name the column in which their runs stand.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from hf_noneuclid.experiments.common import markdown_table
from hf_noneuclid.experiments.reporting.curves import Curve, points_of
from hf_noneuclid.experiments.reporting.panels import LOOKS, OTHER_LOOKS
from hf_noneuclid.experiments.reporting.summary import results_of, summarise
from hf_noneuclid.experiments.reporting.tables import loss, number, rate
from hf_noneuclid.experiments.sweeping.suite import Result, Run, Suite

TUNED = "tuned"  # the column with which the others of the same method are compared
NEAR, FAR = 1.0, 3.0  # percent above it
SMALLEST = 0.1  # nats: excesses over a smaller loss are percentages of this
SHOWN = (-10.0, 20.0)  # percent; what lies outside is drawn at the edge of the figure

Entry = dict[str, Any]
"""The best learning rate of a method in a column."""
Task = Mapping[str, Any]
"""What results.json holds of a task."""


# ---------------------------------------------------------------- numbers


def summarise_tasks(tasks: Iterable[tuple[Suite, Sequence[Result]]]) -> dict[str, Any]:
    """What results.json holds of the tasks, in their order in the suite."""
    found = []
    for suite, results in sorted(tasks, key=lambda task: task[0].report["place"]):
        summary, _ = summarise(suite, results)
        kept = {name: summary[name] for name in ("ran", "runs")}
        found.append({"name": suite.task, "suite": asdict(suite), **kept, "entries": entries(suite, results)})
    return {"name": found[0]["suite"]["name"].partition("/")[0], "tasks": found}


def restore_tasks(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a results.json: the entries are computed again from its runs."""
    tasks = stored["tasks"]
    again = summarise_tasks((Suite(**task["suite"]), results_of(task["runs"])) for task in tasks)
    for task, known in zip(again["tasks"], tasks, strict=True):
        task["ran"] = known["ran"]
    return again


def entries(suite: Suite, results: Sequence[Result]) -> list[Entry]:
    """The best learning rate of each method in each column."""
    by_run = {result.run: result for result in results}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in suite.wanted(results):
        groups[run.curve].append(run)
    found = []
    for runs in groups.values():
        first, points = runs[0], tuple(points_of(runs, by_run))
        curve = Curve(first.method, first.method_options, first.options, points)
        best = curve.best
        entry: Entry = {"column": suite.block_of(first).get("column", first.label), "method": curve.family}
        entry["learning_rate"] = best.learning_rate if best else None
        entry["losses"] = {str(result.run.seed): result.loss for result in best.done} if best else {}
        entry["at_edge"] = len(points) > 2 and best in (points[0], points[-1])
        entry["diverged"] = best is None and any(point.diverged for point in points)
        found.append(entry)
    return found


def excess(entry: Entry | None, other: Entry | None) -> float | None:
    """How much higher a loss is than another one, in percent, over the seeds that both have."""
    if entry is None or other is None or (entry["diverged"] and other["diverged"]):
        return None
    if entry["diverged"] or other["diverged"]:
        return math.inf if entry["diverged"] else -math.inf
    seeds = sorted(entry["losses"].keys() & other["losses"].keys())
    if not seeds:
        return None
    ours, theirs = (fmean(one["losses"][seed] for seed in seeds) for one in (entry, other))
    return 100 * (ours - theirs) / max(theirs, SMALLEST)


def _methods(tasks: Sequence[Task]) -> list[str]:
    """The methods that the suite is about: those that stand in several columns."""
    columns: dict[str, set[str]] = defaultdict(set)
    for task in tasks:
        for entry in task["entries"]:
            columns[entry["method"]].add(entry["column"])
    return [method for method, found in columns.items() if len(found) > 1]


def _of_method(tasks: Sequence[Task], method: str) -> tuple[list[str], list[str], list[dict[str, Entry]]]:
    """The columns of a method, those of other optimizers, and the entries of each task by column."""
    others = {*_methods(tasks)} - {method}
    rows = [{e["column"]: e for e in task["entries"] if e["method"] not in others} for task in tasks]
    kept = [e for task in tasks for e in task["entries"] if e["method"] not in others]
    own = list(dict.fromkeys(e["column"] for e in kept if e["method"] == method))
    return own, list(dict.fromkeys(e["column"] for e in kept if e["method"] != method)), rows


# ---------------------------------------------------------------- text


def tasks_markdown(summary: Mapping[str, Any], figure: str) -> str:
    """The report as Markdown."""
    tasks, parts = summary["tasks"], [f"# {summary['name']}"]
    if missing := sum(task["ran"]["missing"] for task in tasks):
        parts.append(f"**Unfinished: {missing} of the runs known so far are missing.**")
    parts.append(
        "Validation loss at the end of training, in nats: the mean over seeds at the best learning rate. In "
        f"brackets: the excess over the same method {TUNED}, over the seeds that both have; where that loss "
        f"is below {SMALLEST:g} nats, in percent of {SMALLEST:g} nats. *: the best learning rate is at an "
        "end of the grid. -: no run has ended, or none to compare with."
    )
    parts.append(f"![Excess over {TUNED}]({figure})")
    for method in _methods(tasks):
        parts += [f"## {method}", _table(tasks, method), _counts(tasks, method)]
    return "\n\n".join([*parts, "## What was run", _ran(tasks)]) + "\n"


def _table(tasks: Sequence[Task], method: str) -> str:
    own, others, found = _of_method(tasks, method)
    columns = [*own, *others]
    rows = [
        [task["name"], *(_cell(row.get(column), row.get(TUNED)) for column in columns)]
        for task, row in zip(tasks, found, strict=True)
    ]
    return markdown_table(["task", *columns], rows)


def _cell(entry: Entry | None, tuned: Entry | None) -> str:
    if entry is None or not entry["losses"]:
        return "diverged" if entry and entry["diverged"] else "-"
    text = loss(fmean(entry["losses"].values()))
    if entry is tuned:
        return f"{text} at {rate(entry['learning_rate'])}{'*' * entry['at_edge']}"
    above = excess(entry, tuned)
    return text if above is None else f"{text} ({above:+.1f} %)"


def _counts(tasks: Sequence[Task], method: str) -> str:
    """On how many tasks a column is near the tuned method, far from it, ahead of others, or behind them."""
    own, others, found = _of_method(tasks, method)

    def count(column: str, other: str, holds: Callable[[float], bool]) -> str:
        values = [value for row in found if (value := excess(row.get(column), row.get(other))) is not None]
        return str(sum(map(holds, values))) if values else "-"

    head = [f"of {len(tasks)} tasks", f"within {NEAR:g} % of {TUNED}", f"worse than {FAR:g} %"]
    head += [words for other in others for words in (f"ahead of {other}", f"over {NEAR:g} % behind it")]
    rows = []
    for column in own:
        cells = [count(column, TUNED, lambda v: v <= NEAR), count(column, TUNED, lambda v: v > FAR)]
        for other in others:
            cells += [count(column, other, lambda v: v < 0), count(column, other, lambda v: v > NEAR)]
        rows.append([column, *cells])
    return markdown_table(head, rows)


def _ran(tasks: Sequence[Task]) -> str:
    head = ("task", "what it is", "parameters", "done", "diverged", "failed", "missing", "median s", "hours")
    rows = []
    for task in tasks:
        ran, seconds = task["ran"], [run["seconds"] for run in task["runs"] if run["seconds"] is not None]
        counts = [str(ran["states"].get(state, 0)) for state in ("done", "diverged", "failed")]
        sizes = ", ".join(f"{count:,}" for count in ran["parameters"]) or "-"
        hours = [str(ran["missing"]), number(median(seconds) if seconds else None), f"{ran['hours']:.2f}"]
        rows.append([task["name"], task["suite"]["about"], sizes, *counts, *hours])
    lines = [
        f"- {name.capitalize()}: {', '.join(f'{key} {item}' for key, item in sorted(value.items()))}"
        for name in ("commits", "hardware", "versions")
        for task in tasks
        for value in task["ran"][name]
    ]
    return "\n\n".join([markdown_table(head, rows), "\n".join(dict.fromkeys(lines))])


# ---------------------------------------------------------------- figure


def excess_figure(summary: Mapping[str, Any]) -> Figure:
    """The excess of every column over the tuned method on every task: a panel for each method."""
    tasks = summary["tasks"]
    methods, names = _methods(tasks), [task["name"] for task in tasks]
    looks = [*dict.fromkeys(LOOKS.values()), *OTHER_LOOKS]
    figure = Figure(figsize=(2.0 + 2.6 * len(methods), 1.4 + 0.22 * len(tasks)), layout="constrained")
    for place, method in enumerate(methods, 1):
        axes = figure.add_subplot(1, len(methods), place)
        own, others, found = _of_method(tasks, method)
        columns = [column for column in (*own, *others) if column != TUNED]
        for column, (colour, mark) in zip(columns, looks, strict=False):
            values = [excess(row.get(column), row.get(TUNED)) for row in found]
            shown = [math.nan if v is None else min(max(v, SHOWN[0]), SHOWN[1]) for v in values]
            axes.plot(shown, range(len(shown)), mark, color=colour, ms=4, label=column)
        axes.axvspan(-NEAR, NEAR, color="#DDDDDD", zorder=0)
        axes.set(title=method, xlabel=f"excess over {TUNED}, %", xlim=(SHOWN[0] - 1, SHOWN[1] + 1))
        axes.set_yticks(range(len(names)), names if place == 1 else [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        if place == 1:
            legend = axes.get_legend_handles_labels()
            figure.legend(*legend, loc="outside lower center", ncols=2 * len(methods))
    return figure
