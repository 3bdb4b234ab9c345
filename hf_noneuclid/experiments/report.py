"""Reports a sweep: tables, figures, and all their numbers as JSON.

    noneuclid report --study outputs/mini
    noneuclid report --study outputs/gpu --storage postgresql://host/database --study_name gpu
    noneuclid report --results recipes/results/mini

Writes report.md, results.json and PNG figures. An unfinished study is reported as far as it is. The same
study gives the same bytes. For a suite with tasks, the folder of all gives their common table, and the
folder of a task its own report. --results writes a report again from its results.json, without the study. The
figures over time stay as they are, because the file does not hold the histories.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.reporting.report import report, report_again, report_tasks
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, Suite


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report; exits with 2 if there is nothing to report, or it cannot be written."""
    parser = argparse.ArgumentParser(prog="noneuclid report", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", type=Path, help="output folder of noneuclid sweep")
    what.add_argument("--results", type=Path, help="folder of an earlier report, with its results.json")
    parser.add_argument("--storage", help="where the study is, if not in its output folder")
    parser.add_argument("--study_name", help="name of the study, if the storage holds several")
    default = "default: report/ in the study, or the folder of --results"
    parser.add_argument("--output_dir", type=Path, help=default)
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        if args.results is not None:
            path = report_again(args.results, args.output_dir or args.results)
        elif args.storage is None and (studies := sorted(args.study.glob("*/study.db"))):
            path = report_tasks(list(_tasks(studies)), args.output_dir or args.study / "report")
        else:
            study = open_study(args.storage or default_storage(args.study), args.study_name)
            path = report(suite_of(study), results(study), args.output_dir or args.study / "report")
    except InputError as error:
        print(f"noneuclid report: error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT) from None
    print(path)


def _tasks(studies: Sequence[Path]) -> Iterator[tuple[Suite, list[Result]]]:
    """The tasks of a suite. A task that the sweep refused has a study without a suite, and is left out."""
    for study in map(open_study, studies):
        try:
            yield suite_of(study), results(study)
        except InputError as error:
            print(f"noneuclid report: left out: {error}", file=sys.stderr)
