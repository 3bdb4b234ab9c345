"""How a sweep starts one run: as a process group of its own, whose end is waited for."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.sweeping.suite import Run, Suite, as_text
from hf_noneuclid.experiments.sweeping.sweep_folder import (
    can_resume,
    check_folder,
    delete_weights,
    log_of,
    read_log,
    run_folder,
    tail,
)
from hf_noneuclid.experiments.sweeping.trial_queue import Outcome

FOLDER = Path(__file__).parents[1]
PATIENCE = 10.0  # seconds between asking a process to end and ending it
LOOK = 0.2  # seconds between looks at the process

Watch = Callable[[Mapping[str, Any] | None], bool]
"""Is called again and again with what runs (None: as before); False: end it."""


@dataclass(frozen=True)
class Launch:
    """How the processes of a run are started.

    Attributes:
        processes: of a run, on this host.
        accelerate_config: file for accelerate launch, or None.
        threads: OMP_NUM_THREADS.
        gpus: ids of the GPUs that the runs share; empty: CPU.
    """

    processes: int = 1
    accelerate_config: str | None = None
    threads: int = 1
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment of a run; different slots take different GPUs if there are so many."""
        values = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            count = len(self.gpus)
            chosen = [
                self.gpus[(slot * self.processes + i) % count] for i in range(min(self.processes, count))
            ]
            values["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        return values


def recipe_flags(suite: Suite, run: Run, processes: int) -> dict[str, Any]:
    """Return the flags of the recipe for a run.

    Raises:
        InputError: the global batch cannot be cut into equal parts for so many processes.
    """
    flags = {"disable_tqdm": True, **suite.options, **suite.per_method.get(run.method, {}), **run.options}
    pairs = [str(flags.pop("optim_args"))] if flags.get("optim_args") else []
    pairs += [f"{name}={as_text(value)}" for name, value in run.method_options.items()]
    if flags.get("global_batch_size") is not None:
        flags["gradient_accumulation_steps"] = accumulation(flags, processes)
    own = {"optim": run.method, "learning_rate": run.learning_rate, "seed": run.seed}
    return {**own, **({"optim_args": ",".join(pairs)} if pairs else {}), **flags}


def accumulation(flags: Mapping[str, Any], processes: int) -> int:
    """Return the batches a step, so that the global batch is the same on any number of devices.

    Raises:
        InputError: it would not be, or the flags name another number.
    """
    total, batch = int(flags["global_batch_size"]), int(flags.get("per_device_train_batch_size", 8))
    steps, rest = divmod(total, batch * processes)
    if rest or steps == 0:
        raise InputError(
            f"global_batch_size {total} is no multiple of {batch} (per_device_train_batch_size) "
            f"x {processes} (processes): choose another --processes, or "
            "--option per_device_train_batch_size=..."
        )
    given = flags.get("gradient_accumulation_steps")
    if given not in (None, steps):
        raise InputError(
            f"gradient_accumulation_steps {given} does not give global_batch_size {total}: leave it out, "
            f"it is worked out ({steps})"
        )
    return steps


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Write flags as command-line arguments; None leaves the recipe's default."""
    arguments: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(as_text, value)]
        elif value is not None:
            arguments += [f"--{name}={as_text(value)}"]
    return arguments


def launcher(suite: Suite, launch: Launch) -> list[str]:
    """Return the start of a run's command."""
    script = str(FOLDER / f"{suite.recipe}.py")
    if launch.processes == 1 and launch.accelerate_config is None:
        return [sys.executable, script]
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={launch.processes}"]
    if launch.accelerate_config:
        command += [f"--config_file={launch.accelerate_config}"]
    else:  # "multi_gpu" is accelerate's word for torchrun, which starts processes on CPUs as well
        command += ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return [*command, "--main_process_port=0", script]


@dataclass(frozen=True)
class Executor:
    """Runs the recipe for one run after the other.

    Attributes:
        suite: of the runs.
        output_dir: of the sweep; each run has a folder there, and a log beside it.
        launch: how to start.
        origin: names the study: only its own runs are gone on with.
        keep_models: keep weights and checkpoints of runs that have ended.
    """

    suite: Suite
    output_dir: Path
    launch: Launch
    origin: str
    keep_models: bool = False

    def __call__(self, run: Run, watch: Watch, slot: int = 0) -> Outcome:
        """Do a run, or what is left of it.

        Args:
            run: which.
            watch: is shown the process group, and asked whether to go on.
            slot: number of the worker on this host, from 0.
        """
        folder = run_folder(self.output_dir, run)
        flags = recipe_flags(self.suite, run, self.launch.processes)
        same = self._same(folder, flags)
        if same and (folder / "metrics.json").is_file():
            return self._outcome(folder, 0, self._seconds(folder))  # its worker died before it could tell
        resumed = same and can_resume(folder)
        self._note(folder, flags, resumed)
        (folder / "metrics.json").unlink(missing_ok=True)  # of another study, or of an attempt that failed
        command = [*launcher(self.suite, self.launch), *as_arguments(flags), f"--output_dir={folder}"]
        command += ["--resume_from_checkpoint=true" if resumed else "--overwrite_output_dir=true"]
        start = time.monotonic()
        code = self._run(command, folder, watch, slot, "a" if resumed else "w")
        if code is None:
            return Outcome("interrupted")
        return self._outcome(folder, code, None if resumed else time.monotonic() - start)

    def _run(self, command: Sequence[str], folder: Path, watch: Watch, slot: int, mode: str) -> int | None:
        """Run a command; None if it was ended by us."""
        with log_of(folder).open(mode, encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.launch.environment(slot),
                start_new_session=True,
            )
        going = {"group": process.pid, "folder": str(folder), "cwd": os.getcwd()}
        try:
            more = watch(going)
            while more and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
                more = watch(None)
            return process.poll()
        finally:
            end_group(process)

    def _outcome(self, folder: Path, code: int, seconds: float | None) -> Outcome:
        """Read what a run left behind, and delete what nobody will read."""
        path, log = folder / "metrics.json", log_of(folder)
        if not _has_result(path, code):
            path.unlink(missing_ok=True)  # a retry should not take it for its own
            check_folder(self.output_dir)  # a full disk would fail every run
            reason = f"exit code {code}; the end of {log}:\n{tail(log)}"
            refused = code == ExitCode.BAD_INPUT or f"{self.suite.recipe}.py: error: " in read_log(log)
            return Outcome("refused" if refused else "failed", seconds=seconds, metrics={"reason": reason})
        metrics = json.loads(path.read_text(encoding="utf-8"))
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        if not self.keep_models:
            delete_weights(folder)
        state = "diverged" if metrics["diverged"] else "done"
        return Outcome(state, metrics["eval_loss"], metrics.get("diverged_at"), seconds, metrics, history)

    def _same(self, folder: Path, flags: Mapping[str, Any]) -> bool:
        """Say whether what the folder holds is of this run in this study."""
        try:
            note = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return (note.get("study"), note.get("flags")) == (self.origin, dict(flags))

    def _note(self, folder: Path, flags: Mapping[str, Any], resumed: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"study": self.origin, "flags": dict(flags), "resumed": resumed}, indent=2)
        (folder / "run.json").write_text(text + "\n", encoding="utf-8")

    def _seconds(self, folder: Path) -> float | None:
        """Return what a run took that nobody waited for; None if it was resumed."""
        note = folder / "run.json"
        if json.loads(note.read_text(encoding="utf-8"))["resumed"]:
            return None
        return (folder / "metrics.json").stat().st_mtime - note.stat().st_mtime


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, in other groups, too: politely first."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # nobody is left
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil looks at its start, too: never a stranger with the same number
    process.wait()


def _has_result(path: Path, code: int) -> bool:
    """Say whether a run ended well or diverged; accelerate launch makes every exit code but 0 a 1."""
    if not path.is_file():
        return False
    return code == 0 or bool(json.loads(path.read_text(encoding="utf-8"))["diverged"])
