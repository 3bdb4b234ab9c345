"""Writing a report: report.md, results.json and the figures."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    return _write(folder, *summarise(suite, found))


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
        return _write_tasks(folder, restore_tasks(stored))
    return _write(folder, *restore(stored))


def report_tasks(tasks: Sequence[tuple[Suite, Sequence[Result]]], folder: Path) -> Path:
    """Writes the report of a suite with tasks as ``report`` does; a task may have no run yet."""
    _require_results("with tasks", [result for _, found in tasks for result in found])
    return _write_tasks(folder, summarise_tasks(tasks))


def _require_results(name: str, found: Sequence[Result]) -> None:
    ended = any(result.state in FINISHED for result in found)
    require(ended, f"suite {name}: no run has ended yet; start or continue noneuclid sweep first")


def _write_tasks(folder: Path, summary: dict[str, Any]) -> Path:
    with _writing(folder, summary):
        name = "excess.png"
        with matplotlib.rc_context(STYLE):
            save(folder / name, excess_figure(summary))
        page = tasks_markdown(summary, name)
        write_whole(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    return folder / PAGE


def _write(folder: Path, summary: dict[str, Any], curves: Sequence[Curve]) -> Path:
    with _writing(folder, summary):
        draw(folder, curves)
        page = markdown(summary, curves, [name for name in CAPTIONS if (folder / name).is_file()])
        write_whole(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    return folder / PAGE


@contextmanager
def _writing(folder: Path, summary: dict[str, Any]) -> Iterator[None]:
    """Makes the folder with results.json, and says in words what cannot be written."""
    text = json.dumps(finite(summary), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
        yield
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error}; give another") from error
