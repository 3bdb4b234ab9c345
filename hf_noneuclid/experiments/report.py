"""Reports a sweep: tables, figures, and all their numbers as JSON.

    noneuclid report --study outputs/mini
    noneuclid report --study outputs/gpu --storage postgresql://host/database --study_name gpu
    noneuclid report --results recipes/results/mini

Writes report.md, results.json and PNG figures. An unfinished study is reported as far as it is. The same
study gives the same bytes. --results writes a report again from its results.json, without the study. The
figures over time stay as they are, because the file does not hold the histories.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.common import ExitCode, InputError, finite, write_whole
from hf_noneuclid.experiments.reporting.curves import Curve
from hf_noneuclid.experiments.reporting.figures import draw
from hf_noneuclid.experiments.reporting.summary import FINISHED, restore, summarise
from hf_noneuclid.experiments.reporting.text import CAPTIONS, markdown
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, Suite


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report; exits with 2 if there is nothing to report, or it cannot be written."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        if args.results is not None:
            path = report_again(args.results, args.output_dir or args.results)
        else:
            study = open_study(args.storage or default_storage(args.study), args.study_name)
            path = report(suite_of(study), results(study), args.output_dir or args.study / "report")
    except InputError as error:
        print(f"noneuclid report: error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT) from None
    print(path)


def report(suite: Suite, found: Sequence[Result], folder: Path) -> Path:
    """Writes report.md, results.json and the figures to a folder, and gives the path of report.md.

    Raises:
        InputError: No run has ended, or the folder cannot be written to.
    """
    if not any(result.state in FINISHED for result in found):
        raise InputError(f"suite {suite.name}: no run has ended yet; start or continue noneuclid sweep first")
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
    return _write(folder, *restore(stored))


def _write(folder: Path, summary: dict[str, Any], curves: Sequence[Curve]) -> Path:
    text = json.dumps(finite(summary), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw(folder, curves)
        names = [name for name in CAPTIONS if name in drawn or (folder / name).is_file()]
        write_whole(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
        page = markdown(summary, curves, names)
        write_whole(folder / "report.md", lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error}; give another") from error
    return folder / "report.md"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noneuclid report", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", type=Path, help="output folder of noneuclid sweep")
    what.add_argument("--results", type=Path, help="folder of an earlier report, with its results.json")
    parser.add_argument("--storage", help="where the study is, if not in its output folder")
    parser.add_argument("--study_name", help="name of the study, if the storage holds several")
    parser.add_argument(
        "--output_dir", type=Path, help="default: report/ in the study, or the folder of --results"
    )
    return parser.parse_args(argv)
