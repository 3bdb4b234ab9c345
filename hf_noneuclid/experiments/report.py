"""Report a study made by sweep.py: tables, figures, and every number in them as JSON.

    python recipes/report.py --study outputs/mini
    python recipes/report.py --study outputs/gpu --storage postgresql://host/database --study_name gpu

Writes report.md, results.json and PNG figures to the folder report/ of the study, or to --output_dir. A study
that is not finished is reported as far as it is. The same study gives the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_noneuclid.experiments.common import ExitCode, InputError, finite, write_whole
from hf_noneuclid.experiments.reporting.comparison_figures import draw_comparisons
from hf_noneuclid.experiments.reporting.figures import draw_basic
from hf_noneuclid.experiments.reporting.report_text import markdown
from hf_noneuclid.experiments.reporting.summary import FINISHED, summarise
from hf_noneuclid.experiments.sweeping.study import Result, default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Suite


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report; exits with 2 if there is nothing to report or nowhere to write it."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        study = open_study(args.storage or default_storage(args.study), args.study_name)
        path = report(suite_of(study), results(study), args.output_dir or args.study / "report")
    except InputError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT) from None
    print(path)


def report(suite: Suite, found: Sequence[Result], folder: Path) -> Path:
    """Write report.md, results.json and the figures.

    Args:
        suite: as it was when the study was made.
        found: one result a run.
        folder: is made if there is none.

    Returns:
        The path of report.md.

    Raises:
        InputError: no run has ended, or the folder cannot be written to.
    """
    if not any(result.state in FINISHED for result in found):
        raise InputError(f"suite {suite.name}: no run has ended yet; start or continue sweep.py first")
    summary, curves = summarise(suite, found)
    text = json.dumps(finite(summary), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [*draw_basic(folder, curves), *draw_comparisons(folder, curves)]
        write_whole(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
        page = markdown(summary, names)
        write_whole(folder / "report.md", lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error}; give another") from error
    return folder / "report.md"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="output folder of sweep.py")
    parser.add_argument("--storage", help="where the trials are, if sweep.py was told so")
    parser.add_argument("--study_name", help="of the study, if the storage holds several")
    parser.add_argument(
        "--output_dir", type=Path, help="folder for the report; by default report/ of the study"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
