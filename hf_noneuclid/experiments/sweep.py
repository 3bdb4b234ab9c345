"""Runs a suite: every method at every learning rate, as many runs at a time as there is room for.

    noneuclid sweep --suite mini
    noneuclid sweep --suite gpu --option "train_files=[a.txt, b.txt]" --workers 4

Finished runs are kept: after a crash, the same command continues. Several hosts share the work if they use
the same database as --storage. --dry_run prints the commands and what they cost.
"""

import argparse
import difflib
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import yaml

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.sweeping.commands import choose_launch, recipe_flags
from hf_noneuclid.experiments.sweeping.execution import START, Executor, check_folder
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, Suite, load_suites
from hf_noneuclid.experiments.sweeping.trial_queue import Execute, TrialQueue, run_worker

ENDED = ("done", "diverged", "failed")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sweep; exits with 1 if a run failed, 2 for bad input, 130 if it was interrupted."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        code = sweep(args)
    except (InputError, OSError, optuna.exceptions.StorageInternalError) as error:
        print(f"noneuclid sweep: error: {error}", file=sys.stderr)
        code = ExitCode.BAD_INPUT
    if code:
        raise SystemExit(code)


def sweep(args: argparse.Namespace) -> int:
    """Does what the command line says, one task of the suite after the other, and gives the exit code."""
    suites = load_suites(args.suite, dict(args.option), args.task)
    code = 0
    for suite in suites:
        if suite.task:
            print(f"# {suite.name}: {suite.about}", file=sys.stderr)
        folder = args.output_dir or Path("outputs") / suite.name.partition("/")[0]
        try:
            ended = sweep_one(args, suite, folder / suite.task)
        except InputError as error:
            if not suite.task:
                raise
            # The other tasks can still run.
            print(f"noneuclid sweep: error: {suite.name}: {error}", file=sys.stderr)
            ended = ExitCode.BAD_INPUT
        code = max(code, ended)
        if ended == ExitCode.INTERRUPTED:
            break
    return code


def sweep_one(args: argparse.Namespace, suite: Suite, folder: Path) -> int:
    """Does a suite, or one task, in its folder, and gives the exit code."""
    if suite.start:
        suite = replace(suite, options={**suite.options, "model_name_or_path": str(folder / START)})
    launch = choose_launch(suite, args.processes, args.accelerate_config)
    for run in suite.possible_runs():
        recipe_flags(suite, run, launch.processes)  # the global batch is checked before anything else
    storage = args.storage or default_storage(folder)
    name = "/".join(filter(None, (args.study_name, suite.task))) if args.study_name else suite.name
    if args.dry_run:
        from hf_noneuclid.experiments.sweeping import dry_run  # imports torch

        dry_run.show(suite, launch, folder, args.device_flops, results_so_far(storage, name, suite))
        return 0
    check_folder(folder)
    study = prepare_study(storage, name, suite, launch.processes)
    queue = TrialQueue(study, suite)
    if args.retry_failed:
        queue.retry_failed()
    execute = Executor(suite, folder, launch, study.user_attrs["id"], args.keep_models)
    interrupted = work(queue, execute, args.workers or launch.workers)
    found = results(study)
    failed = [result for result in found if result.state == "failed"]
    for result in failed:
        print(f"\n{result.run} failed: {result.metrics['reason']}", file=sys.stderr)
    counts = (f"{sum(result.state == state for result in found)} {state}" for state in ENDED)
    print(", ".join(counts), file=sys.stderr)
    if interrupted:
        print("Interrupted. The same command continues the sweep.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if failed else 0


def prepare_study(storage: str, name: str, suite: Suite, processes: int) -> optuna.Study:
    """Opens the study, or makes it after the suite has been checked.

    Raises:
        InputError: The suite is wrong, the study is of another suite, or the storage cannot be used.
    """
    study = open_study(storage, name, suite=suite)
    if "suite" in study.user_attrs:
        check_same(suite_of(study), suite, storage)
    else:
        from hf_noneuclid.experiments.sweeping import suite_checks  # imports torch and transformers

        suite_checks.check_suite(suite, processes)
        suite_checks.check_model(suite)
        study.set_user_attr("id", uuid.uuid4().hex)
        study.set_user_attr("suite", asdict(suite))
    return study


def results_so_far(storage: str, name: str, suite: Suite) -> list[Result]:
    """The results in the study of the same suite; none where there is no such study."""
    try:
        study = open_study(storage, name)
        check_same(suite_of(study), suite, storage)
    except InputError:
        return []
    return results(study)


def check_same(old: Suite, new: Suite, storage: str) -> None:
    """Refuses to continue a study of another suite.

    Raises:
        InputError: The suites differ; the message shows how.
    """
    before, now = (yaml.safe_dump(suite.identity).splitlines() for suite in (old, new))
    difference = list(difflib.unified_diff(before, now, "in the study", "now", lineterm="", n=1))
    if difference:
        raise InputError(
            f"the study in {scrub(storage)} was made with another suite. Use that suite, or give another "
            "--output_dir, or with --storage another --study_name:\n" + "\n".join(difference)
        )


def work(queue: TrialQueue, execute: Execute, workers: int) -> bool:
    """Lets workers do the suite, with a line for every run that ends.

    Ctrl-C and the signal of a job scheduler give the runs back to the queue.

    Returns:
        Whether a signal interrupted the work.
    """
    stop = threading.Event()
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(number)
        stop.set()

    def show(result: Result) -> None:
        found = results(queue.study)  # the runs of other hosts count too
        ended, wanted = sum(item.state in ENDED for item in found), len(queue.suite.wanted(found))
        words = result.state if result.loss is None else f"{result.loss:.4f}"
        step = "" if result.diverged_at is None else f" at step {result.diverged_at}"
        time = "" if result.seconds is None else f" ({result.seconds:.0f} s)"
        print(f"[{ended}/{wanted}] {result.run}: {words}{step}{time}", file=sys.stderr)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(workers) as pool:
            slots = range(workers)
            futures = [
                pool.submit(run_worker, queue, execute, stop=stop, slot=slot, ended=show) for slot in slots
            ]
            wait(futures, return_when=FIRST_EXCEPTION)
            stop.set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for future in futures:
        future.result()
    return bool(received)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noneuclid sweep", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--suite", required=True, help="name of a file in recipes/suites/, or a .yaml file")
    add("--task", help="only this task of a suite with several")
    add("--output_dir", type=Path, help="default: outputs/<suite>; a task has a folder in it")
    add("--storage", help="SQLite file or database URL; default: <output_dir>/study.db")
    add("--study_name", help="default: the name of the suite")
    add("--workers", type=_count, help="runs at a time; default: as many as fit")
    add("--processes", type=_count, help="processes (GPUs) of a run")
    add("--accelerate_config", help="file for accelerate launch")
    per_run = "flag of the recipe for all runs"
    add("--option", type=_option, action="append", default=[], metavar="KEY=VALUE", help=per_run)
    add("--keep_models", action="store_true", help="keep weights and checkpoints")
    add("--retry_failed", action="store_true", help="try failed runs again")
    add("--dry_run", action="store_true", help="print commands and costs; write nothing")
    add("--device_flops", type=float, default=4e14, help="FLOP/s of a GPU, for --dry_run; default: 4e14")
    return parser.parse_args(argv)


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected key=value, not {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)
