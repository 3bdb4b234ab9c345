"""Writing a report: report.md, results.json and the figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from hf_noneuclid.experiments.common import STYLE, InputError, finite, require, write_whole
from hf_noneuclid.experiments.reporting.curves import Curve
from hf_noneuclid.experiments.reporting.figures import draw, save
from hf_noneuclid.experiments.reporting.summary import FINISHED, restore, summarise
from hf_noneuclid.experiments.reporting.tasks import (
    excess_figure,
    restore_tasks,
    summarise_tasks,
    tasks_markdown,
)
from hf_noneuclid.experiments.reporting.text import CAPTIONS, markdown
from hf_noneuclid.experiments.sweeping.suite import Result, Suite

PAGE = "report.md"


def report(suite: Suite, found: Sequence[Result], folder: Path) -> Path:
    """Writes report.md, results.json and the figures to a folder, and gives the path of report.md.

    Raises:
        InputError: No run has ended, or the folder cannot be written to.
    """
    _require_results(suite.name, found)
    return _write(folder, _draw_curves, *summarise(suite, found))


def report_again(results_folder: Path, folder: Path) -> Path:
    """Writes a report again from the results.json of an earlier one.

    Raises:
        InputError: There is no results.json, or the folder cannot be written to.
    """
    path = results_folder / "results.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--results {results_folder}: {path} cannot be read: {error}") from error
    if "tasks" in stored:
        return _write(folder, _draw_tasks, restore_tasks(stored))
    return _write(folder, _draw_curves, *restore(stored))


def report_tasks(tasks: Sequence[tuple[Suite, Sequence[Result]]], folder: Path) -> Path:
    """Writes the report of a suite with tasks as ``report`` does; a task may have no run yet."""
    _require_results("with tasks", [result for _, found in tasks for result in found])
    return _write(folder, _draw_tasks, summarise_tasks(tasks))


def _require_results(name: str, found: Sequence[Result]) -> None:
    ended = any(result.state in FINISHED for result in found)
    require(ended, f"suite {name}: no run has ended yet; start or continue noneuclid sweep first")


def _draw_curves(folder: Path, summary: dict[str, Any], curves: Sequence[Curve]) -> str:
    draw(folder, curves)
    return markdown(summary, curves, [name for name in CAPTIONS if (folder / name).is_file()])


def _draw_tasks(folder: Path, summary: dict[str, Any]) -> str:
    with matplotlib.rc_context(STYLE):
        save(folder / "excess.png", excess_figure(summary))
    return tasks_markdown(summary, "excess.png")


def _write(folder: Path, make_page: Callable[..., str], summary: dict[str, Any], *more: Any) -> Path:
    """Writes results.json, the figures and the page; says in words what cannot be written."""
    text = json.dumps(finite(summary), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
        page = make_page(folder, summary, *more)
        write_whole(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error}; give another") from error
    return folder / PAGE
