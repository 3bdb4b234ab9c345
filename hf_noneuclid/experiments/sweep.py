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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.sweeping.commands import choose_launch, recipe_flags
from hf_noneuclid.experiments.sweeping.execution import Executor, check_folder
from hf_noneuclid.experiments.sweeping.study import default_storage, open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, Suite, load_suite
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
    """Does what the command line says, and gives the exit code."""
    suite = load_suite(args.suite, read_options(args.option))
    launch = choose_launch(suite, args.processes, args.accelerate_config)
    for run in suite.possible_runs():
        recipe_flags(suite, run, launch.processes)  # the global batch is checked before anything else
    folder = args.output_dir or Path("outputs") / suite.name
    if args.dry_run:
        from hf_noneuclid.experiments.sweeping import dry_run  # imports torch

        dry_run.show(suite, launch, folder, args.device_flops)
        return 0
    check_folder(folder)
    storage = args.storage or default_storage(folder)
    study = prepare_study(storage, args.study_name or suite.name, suite, launch.processes)
    queue = TrialQueue(study, suite)
    if args.retry_failed:
        queue.retry_failed()
    execute = Executor(suite, folder, launch, study.user_attrs["id"], args.keep_models)
    interrupted = work(queue, execute, args.workers or launch.workers)
    found = results(study)
    for result in found:
        if result.state == "failed":
            print(f"\n{result.run} failed: {result.metrics['reason']}", file=sys.stderr)
    counts = (f"{sum(result.state == state for result in found)} {state}" for state in ENDED)
    print(", ".join(counts), file=sys.stderr)
    if interrupted:
        print("Interrupted. The same command continues the sweep.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if any(result.state == "failed" for result in found) else 0


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
    """Lets workers do the suite, with a line for every run that ends; says whether it was interrupted."""
    stop = threading.Event()

    def show(result: Result) -> None:
        found = results(queue.study)  # the runs of other hosts count too
        ended, wanted = sum(item.state in ENDED for item in found), len(queue.suite.wanted(found))
        words = result.state if result.loss is None else f"{result.loss:.4f}"
        step = "" if result.diverged_at is None else f" at step {result.diverged_at}"
        time = "" if result.seconds is None else f" ({result.seconds:.0f} s)"
        print(f"[{ended}/{wanted}] {result.run}: {words}{step}{time}", file=sys.stderr)

    run = partial(run_worker, queue, execute, stop=stop, ended=show)
    with _signals(stop) as received, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, slot=slot) for slot in range(workers)]
        wait(futures, return_when=FIRST_EXCEPTION)
        stop.set()
    for future in futures:
        future.result()
    return bool(received)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[list[int]]:
    """Sets the event on Ctrl-C, and on the signal of a job scheduler; yields the signals that came."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_options(pairs: Sequence[str]) -> Mapping[str, Any]:
    """The values of --option key=value, read as YAML.

    Raises:
        InputError: One has no value, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--option {pair}: {error}") from error
        if not sign:
            raise InputError(f"--option {pair}: expected key=value")
    return values


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noneuclid sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", required=True, help="name of a file in recipes/suites/, or a .yaml file")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/<suite>")
    parser.add_argument("--storage", help="SQLite file or database URL; default: <output_dir>/study.db")
    parser.add_argument("--study_name", help="default: the name of the suite")
    parser.add_argument("--workers", type=_count, help="runs at a time; default: as many as fit")
    parser.add_argument("--processes", type=_count, help="processes (GPUs) of a run")
    parser.add_argument("--accelerate_config", help="file for accelerate launch")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="flag of the recipe for all runs"
    )
    parser.add_argument("--keep_models", action="store_true", help="keep weights and checkpoints")
    parser.add_argument("--retry_failed", action="store_true", help="try failed runs again")
    parser.add_argument("--dry_run", action="store_true", help="print commands and costs; write nothing")
    parser.add_argument(
        "--device_flops", type=float, default=4e14, help="FLOP/s of a GPU, for --dry_run; default: 4e14"
    )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)
