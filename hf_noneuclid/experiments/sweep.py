"""Run a suite: every method at every learning rate, as many at a time as there is room for.

    python recipes/sweep.py --suite mini
    python recipes/sweep.py --suite gpu --option "train_files=[a.txt, b.txt]" --workers 4

What is done stays done: start it again after a crash and it goes on; start it on other hosts with the same
--storage and they share the work. `--dry_run` prints what would run, and what it would cost.
"""

import argparse
import difflib
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import yaml

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.sweeping.execution import Executor, Launch, recipe_flags
from hf_noneuclid.experiments.sweeping.progress import Progress, summary
from hf_noneuclid.experiments.sweeping.study import default_storage, hide_password, open_study, results
from hf_noneuclid.experiments.sweeping.suite import Suite, load_suite
from hf_noneuclid.experiments.sweeping.sweep_folder import check_folder
from hf_noneuclid.experiments.sweeping.trial_queue import TrialQueue
from hf_noneuclid.experiments.sweeping.worker import run_worker

ROOT = Path(__file__).parents[1]
WITHOUT_SHARDS = ("NO", "MULTI_GPU", "MULTI_CPU")
REFRESH = 2.0  # seconds between looks at the study


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep; exits with 1 if a run failed, 2 for bad input, 130 if it was interrupted."""
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        code = sweep(args)
    except (InputError, OSError, optuna.exceptions.StorageInternalError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        code = ExitCode.BAD_INPUT
    if code:
        raise SystemExit(code)


def sweep(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    suite = load_suite(args.suite, read_options(args.option))
    launch = launch_of(suite, args)
    for run in suite.possible_runs():
        recipe_flags(suite, run, launch.processes)  # the global batch, before anything else
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
    workers = args.workers or default_workers(launch)
    interrupted = work(queue, execute, workers)
    found = results(study)
    print(summary(found), file=sys.stderr)
    if interrupted:
        print("Interrupted. Start again with the same command to go on.", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if any(result.state == "failed" for result in found) else 0


def prepare_study(storage: str, name: str, suite: Suite, processes: int) -> optuna.Study:
    """Open the study, or make it; a suite is checked before a study is made of it.

    Raises:
        InputError: the suite is wrong, the study is of another suite, or the storage cannot be used.
    """
    study = open_study(storage, name, suite=suite)
    if (found := study.user_attrs.get("suite")) is not None:
        check_same(Suite.from_dict(found), suite, storage)
    else:
        from hf_noneuclid.experiments.sweeping import suite_checks  # imports torch and transformers

        suite_checks.check_suite(suite, processes)
        suite_checks.check_model(suite)
        study.set_user_attr("id", uuid.uuid4().hex)
        study.set_user_attr("suite", suite.to_dict())
    return study


def check_same(old: Suite, new: Suite, storage: str) -> None:
    """Refuse to go on with a study of another suite.

    Raises:
        InputError: the suites differ; shows how.
    """
    texts = [yaml.safe_dump(suite.identity).splitlines() for suite in (old, new)]
    difference = list(difflib.unified_diff(*texts, "in the study", "now", lineterm="", n=1))
    if difference:
        raise InputError(
            f"the study in {hide_password(storage)} was made with another suite; go back to it, or give "
            "another --output_dir (with a --storage of your own: another --study_name):\n"
            + "\n".join(difference)
        )


def work(queue: TrialQueue, execute: Executor, workers: int) -> bool:
    """Let workers do the suite; returns whether it was interrupted."""
    progress = Progress(queue.suite, results(queue.study))
    stop = threading.Event()
    with _signals(stop) as received, ThreadPoolExecutor(workers) as pool:
        options = {"stop": stop, "ended": progress.ended}
        futures = [pool.submit(run_worker, queue, execute, slot=slot, **options) for slot in range(workers)]
        try:
            while wait(futures, REFRESH, FIRST_EXCEPTION).not_done:
                progress.update(results(queue.study))
                if any(future.done() and future.exception() for future in futures):
                    stop.set()
            progress.update(results(queue.study))
        finally:
            stop.set()
            progress.close()
    for future in futures:
        future.result()
    return bool(received)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[list[int]]:
    """Set the event on Ctrl-C and on what a scheduler sends; yields the signals that came."""
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


def launch_of(suite: Suite, args: argparse.Namespace) -> Launch:
    """Return how runs are started: as the suite says, unless the command line says otherwise.

    Raises:
        InputError: the accelerate configuration cannot be read.
    """
    config = args.accelerate_config or suite.launch["accelerate_config"]
    processes = args.processes or suite.launch["processes"]
    if config is not None:
        if not Path(config).exists() and (ROOT / config).exists():
            config = str(ROOT / config)
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
            processes = processes or int(content["num_processes"])
            if processes == 1 and content.get("distributed_type", "NO") in WITHOUT_SHARDS:
                config = None  # accelerate refuses to launch one process of several
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise InputError(f"accelerate configuration {config}: {type(error).__name__}: {error}") from error
    gpus = () if suite.options.get("use_cpu") else visible_gpus()
    return Launch(processes or 1, config, suite.launch["threads"], gpus)


def visible_gpus() -> tuple[str, ...]:
    """Return the ids of the GPUs that runs may use; asks the driver, since importing torch takes seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name for name in chosen.split(",") if name and name != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return tuple(str(i) for i, line in enumerate(listing.splitlines()) if line.startswith("GPU "))


def default_workers(launch: Launch) -> int:
    """Return how many runs fit on this host at a time."""
    if launch.gpus:
        return max(1, len(launch.gpus) // launch.processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (launch.threads * launch.processes))


def read_options(pairs: Sequence[str]) -> Mapping[str, Any]:
    """Return the values of --option key=value, read as YAML.

    Raises:
        InputError: one has no value.
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
    parser = argparse.ArgumentParser(prog="sweep.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", required=True, help="name of a file in recipes/suites/, or a .yaml file")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/<suite>")
    parser.add_argument(
        "--storage", help="Optuna journal file, .db file or database URL; default: <output_dir>/study.log"
    )
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
        "--device_flops",
        type=_rate,
        default=4e14,
        help="of a GPU, FLOP/s, for --dry_run; default: 4e14, assumed",
    )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


if __name__ == "__main__":
    main()
