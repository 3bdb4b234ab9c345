"""The report of a suite with tasks: how each method does on every task, beside the same method tuned.

The blocks of such a suite name the column in which their runs stand.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from hf_noneuclid.experiments.common import markdown_table
from hf_noneuclid.experiments.reporting.curves import Curve, points_of
from hf_noneuclid.experiments.reporting.panels import OTHER_LOOKS
from hf_noneuclid.experiments.reporting.summary import results_of, summarise
from hf_noneuclid.experiments.reporting.tables import loss, number, rate
from hf_noneuclid.experiments.sweeping.suite import Result, Run, Suite

TUNED = "tuned"  # the column with which the others of the same method are compared
NEAR, FAR = 1.0, 3.0  # percent above it
SMALLEST = 0.1  # nats: excesses over a smaller loss are percentages of this
SHOWN = (-10.0, 20.0)  # percent; what lies outside is drawn at the edge of the figure

Entry = dict[str, Any]
"""The best point of one method in one column of one task."""
Numbers = Mapping[str, Any]
"""A part of results.json."""


# ---------------------------------------------------------------- numbers


def summarise_tasks(tasks: Iterable[tuple[Suite, Sequence[Result]]]) -> dict[str, Any]:
    """What results.json holds of the tasks, in their order in the suite."""
    found = []
    for suite, results in sorted(tasks, key=lambda task: task[0].report.get("place", 0)):
        summary, _ = summarise(suite, results)
        kept = {name: summary[name] for name in ("ran", "runs")}
        found.append({"suite": asdict(suite), **kept, "entries": entries(suite, results)})
    return {"name": found[0]["suite"]["name"].partition("/")[0], "tasks": found}


def restore_tasks(stored: Numbers) -> dict[str, Any]:
    """The summary of a results.json, with the entries computed again from its runs."""
    suites = [Suite(**task["suite"]) for task in stored["tasks"]]
    again = summarise_tasks(
        (suite, results_of(task["runs"])) for suite, task in zip(suites, stored["tasks"], strict=True)
    )
    known = {task["suite"]["name"]: task["ran"] for task in stored["tasks"]}
    return {**again, "tasks": [{**task, "ran": known[task["suite"]["name"]]} for task in again["tasks"]]}


def entries(suite: Suite, results: Sequence[Result]) -> list[Entry]:
    """The best point of each method in each column, with its excess over the tuned method in percent.

    Only the seeds that both have are compared.
    """
    by_run = {result.run: result for result in results}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in suite.wanted(results):
        groups[run.curve].append(run)
    best: dict[tuple[str, str], Entry] = {}
    for first, *others in groups.values():
        points = tuple(points_of([first, *others], by_run))
        curve = Curve(first.method, first.method_options, first.options, points)
        entry = _entry(suite.block_of(first).get("column", first.label), curve)
        best.setdefault((entry["method"], entry["column"]), entry)
    for (method, _), entry in best.items():
        entry["excess"] = excess(entry, best.get((method, TUNED)))
    return list(best.values())


def _entry(column: str, curve: Curve) -> Entry:
    best, ended = curve.best, [point for point in curve.points if point.done or point.diverged]
    return {
        "column": column,
        "method": curve.family,
        "loss": best.loss if best else None,
        "learning_rate": best.learning_rate if best else None,
        "by_seed": {str(result.run.seed): result.loss for result in best.done} if best else {},
        "at_edge": len(curve.points) > 2 and best in (curve.points[0], curve.points[-1]),
        "diverged": bool(ended) and best is None,
    }


def excess(entry: Entry, other: Entry | None) -> float | None:
    """How much higher a loss is than another one, in percent, over the seeds that both have."""
    seeds = entry["by_seed"].keys() & other["by_seed"].keys() if other else ()
    if not other or not seeds:
        return None
    ours, theirs = (fmean(one["by_seed"][seed] for seed in sorted(seeds)) for one in (entry, other))
    return 100 * (ours - theirs) / max(theirs, SMALLEST)


# ---------------------------------------------------------------- text


def tasks_markdown(summary: Numbers, figures: Sequence[str]) -> str:
    """The report as Markdown."""
    tasks = summary["tasks"]
    missing = sum(task["ran"]["missing"] for task in tasks)
    lines = [f"# {summary['name']}"]
    if missing:
        lines.append(f"**Unfinished: {missing} of the runs known so far are missing.**")
    lines.append(
        "Validation loss at the end of training, in nats: the mean over seeds at the best learning rate. In "
        f"brackets: the excess over the same method {TUNED}, over the seeds that both have; where that loss "
        f"is below {SMALLEST:g} nats, in percent of {SMALLEST:g} nats. *: the best learning rate is at an "
        "end of the grid. -: no run has ended."
    )
    lines += [f"![{name}]({name})" for name in figures]
    for method in _methods(tasks):
        lines += [f"## {method}", _table(tasks, method), _counts(tasks, method)]
    return "\n\n".join([*lines, "## What was run", _ran(tasks)]) + "\n"


def _methods(tasks: Sequence[Numbers]) -> list[str]:
    """The methods that stand in more than one column: those that the suite is about."""
    columns: dict[str, set[str]] = defaultdict(set)
    for entry in (entry for task in tasks for entry in task["entries"]):
        columns[entry["method"]].add(entry["column"])
    return [method for method, found in columns.items() if len(found) > 1]


def _columns(tasks: Sequence[Numbers], method: str) -> tuple[list[str], list[str]]:
    """The columns of a method, and those of the optimizers that it is compared with."""
    methods, own, others = _methods(tasks), dict[str, None](), dict[str, None]()
    for entry in (entry for task in tasks for entry in task["entries"]):
        if entry["method"] == method:
            own[entry["column"]] = None
        elif entry["method"] not in methods:
            others[entry["column"]] = None
    return list(own), list(others)


def _of(task: Numbers, method: str) -> dict[str, Entry]:
    """The entries of a task by column: those of a method, and of the optimizers beside it."""
    beside = {entry["column"]: entry for entry in task["entries"] if entry["method"] == method}
    return {**{entry["column"]: entry for entry in task["entries"]}, **beside}


def _table(tasks: Sequence[Numbers], method: str) -> str:
    own, others = _columns(tasks, method)
    rows = []
    for task in tasks:
        found = _of(task, method)
        cells = (_cell(found.get(column), found.get(TUNED)) for column in (*own, *others))
        rows.append([task["suite"]["name"].partition("/")[2], *cells])
    return markdown_table(["task", *own, *others], rows)


def _cell(entry: Entry | None, tuned: Entry | None) -> str:
    if entry is None or entry["loss"] is None:
        return "diverged" if entry and entry["diverged"] else "-"
    above = None if entry is tuned else excess(entry, tuned)
    where = f" at {rate(entry['learning_rate'])}{'*' * entry['at_edge']}" if entry is tuned else ""
    return f"{loss(entry['loss'])}{where}" + ("" if above is None else f" ({above:+.1f} %)")


def _counts(tasks: Sequence[Numbers], method: str) -> str:
    """On how many tasks the targets are met."""
    own, others = _columns(tasks, method)
    head = [f"of {len(tasks)} tasks", f"within {NEAR:g} % of {TUNED}", f"worse than {FAR:g} %"]
    rows = []
    for column in (column for column in own if column != TUNED):
        near = _count(tasks, method, column, TUNED, lambda above: above <= NEAR)
        far = _count(tasks, method, column, TUNED, lambda above: above > FAR)
        ahead = [_count(tasks, method, column, other, lambda above: above < 0) for other in others]
        behind = [_count(tasks, method, column, other, lambda above: above > NEAR) for other in others]
        rows.append([column, near, far, *(f"{a}, {b}" for a, b in zip(ahead, behind, strict=True))])
    return markdown_table([*head, *(f"ahead of {other}, over {NEAR:g} % behind" for other in others)], rows)


def _count(
    tasks: Sequence[Numbers], method: str, column: str, other: str, holds: Callable[[float], bool]
) -> str:
    """On how many tasks it holds of the excess over another column. A diverged run has an infinite one."""
    count = 0
    for found in (_of(task, method) for task in tasks):
        one, beside = found.get(column), found.get(other)
        if one and beside and (one["diverged"] or beside["diverged"]):
            above: float | None = float("inf") * (one["diverged"] - beside["diverged"] or float("nan"))
        else:
            above = excess(one, beside) if one else None
        count += above is not None and holds(above)
    return str(count)


def _ran(tasks: Sequence[Numbers]) -> str:
    head = ("task", "what it is", "parameters", "runs", "diverged", "failed", "missing", "median s", "hours")
    rows = []
    for task in tasks:
        ran, states = task["ran"], task["ran"]["states"]
        seconds = [run["seconds"] for run in task["runs"] if run["seconds"] is not None]
        counts = [str(states.get(name, 0)) for name in ("done", "diverged", "failed")]
        size = ", ".join(f"{count:,}" for count in ran["parameters"]) or "-"
        times = [number(median(seconds) if seconds else None), f"{ran['hours']:.2f}"]
        name, about = task["suite"]["name"].partition("/")[2], task["suite"]["about"]
        rows.append([name, about, size, *counts, str(ran["missing"]), *times])
    facts = []
    for title in ("commits", "hardware", "versions"):
        values = [value for task in tasks for value in task["ran"].get(title, [])]
        texts = dict.fromkeys(", ".join(f"{key} {item}" for key, item in value.items()) for value in values)
        facts += [f"- {title.capitalize()}: {text}" for text in texts]
    return markdown_table(head, rows) + "\n\n" + "\n".join(facts)


# ---------------------------------------------------------------- figure


def excess_figure(summary: Numbers) -> Figure:
    """The excess over the tuned method of every column on every task: a panel for each method."""
    tasks = summary["tasks"]
    methods = _methods(tasks)
    size = (2.0 + 2.6 * max(1, len(methods)), 1.4 + 0.22 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(1, len(methods)), sharey=True, squeeze=False)[0]
    names = [task["suite"]["name"].partition("/")[2] for task in tasks]
    looks = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#000000", "v"), *OTHER_LOOKS]
    for axes, method in zip(panels, methods, strict=False):
        own, others = _columns(tasks, method)
        for column, (colour, mark) in zip(
            [c for c in (*own[::-1], *others) if c != TUNED], looks, strict=False
        ):
            found = [_of(task, method) for task in tasks]
            values = [excess(one[column], one.get(TUNED)) if column in one else None for one in found]
            places = [(min(max(v, SHOWN[0]), SHOWN[1]), i) for i, v in enumerate(values) if v is not None]
            axes.plot(
                *zip(*places, strict=True) if places else ((), ()), mark, color=colour, ms=4, label=column
            )
        axes.axvspan(-NEAR, NEAR, color="#DDDDDD", zorder=0)
        axes.set(title=method, xlabel=f"excess over {TUNED}, %", xlim=(SHOWN[0] - 1, SHOWN[1] + 1))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure
