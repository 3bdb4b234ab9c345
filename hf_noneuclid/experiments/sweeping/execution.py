"""Starting a run and waiting for its end, and the folder that it leaves."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, TextIO

import psutil

from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.sweeping.commands import Launch, command_of, recipe_flags
from hf_noneuclid.experiments.sweeping.suite import Result, Run, State, Suite
from hf_noneuclid.experiments.training.checkpoints import checkpoints_of, read_state

PATIENCE = 10.0  # seconds between asking a process to end and killing it
LOOK = 0.2  # seconds between looks at a process
LOG_TAIL = 15  # lines kept of a run that failed
ROOM = 1 << 20  # bytes that must fit on the disk
START = "start"  # the folder of the model that every run starts from, where the suite says how to make it
WEIGHTS = ("checkpoint-*", "model*.safetensors*", "pytorch_model*", "adapter_model*")


@dataclass(frozen=True)
class Executor:
    """Starts the recipe for one run after the other.

    Attributes:
        suite: The suite of the runs.
        output_dir: Folder of the sweep. Each run has a folder in it, and a log beside that.
        launch: How processes are started.
        study_id: Identity of the study. Only a run of the same study is resumed.
        keep_models: Whether weights and checkpoints stay when a run has ended.
    """

    suite: Suite
    output_dir: Path
    launch: Launch
    study_id: str
    keep_models: bool = False

    def __call__(self, run: Run, stop: Event, slot: int = 0) -> Result | None:
        """Does a run, or what is left of it, in a slot of this host; None if the event stopped it."""
        folder = run_folder(self.output_dir, run)
        folder.mkdir(parents=True, exist_ok=True)
        with log_of(folder).open("a", encoding="utf-8") as log:
            # The processes of the run inherit the log, and with it the lock. A run that outlived its sweep
            # holds it: we wait for its end, and find its result in the folder.
            if not _lock(log, stop):
                return None
            if not self._start(stop, slot):
                return None
            return self._do(run, folder, log, stop, slot)

    def _start(self, stop: Event, slot: int) -> bool:
        """Trains the model that every run starts from, unless it is there; False if the event stopped it.

        Raises:
            InputError: Its training failed.
        """
        folder = self.output_dir / START
        if not self.suite.start or (folder / "metrics.json").is_file():
            return True
        folder.mkdir(exist_ok=True)
        with log_of(folder).open("a", encoding="utf-8") as log:
            if not _lock(log, stop):
                return False
            if (folder / "metrics.json").is_file():  # another worker has made it
                return True
            flags = {"disable_tqdm": True, **self.suite.start}
            command = self._command("pretrain", flags, folder, can_resume(folder))
            code = _wait(command, log, self.launch.environment(slot), stop)
            if code:
                raise InputError(f"the model that the runs start from was not trained: see {log_of(folder)}")
            return code == 0

    def _do(self, run: Run, folder: Path, log: TextIO, stop: Event, slot: int) -> Result | None:
        flags = recipe_flags(self.suite, run, self.launch.processes)
        note, metrics = folder / "run.json", folder / "metrics.json"
        identity = {"study": self.study_id, "flags": flags}
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        resumed = known.pop("resumed", False)
        if known == identity and metrics.is_file():  # the worker that started the run is dead
            seconds = None if resumed else metrics.stat().st_mtime - note.stat().st_mtime
            return self._result(run, folder, 0, seconds)
        resumed = known == identity and can_resume(folder)
        note.write_text(json.dumps({**identity, "resumed": resumed}, indent=2) + "\n", encoding="utf-8")
        metrics.unlink(missing_ok=True)  # of another study, or of an attempt that failed
        if not resumed:
            log.truncate(0)
        command = self._command(self.suite.recipe, flags, folder, resumed)
        start = time.monotonic()
        code = _wait(command, log, self.launch.environment(slot), stop)
        if code is None:
            return None
        return self._result(run, folder, code, None if resumed else time.monotonic() - start)

    def _command(self, recipe: str, flags: Mapping[str, Any], folder: Path, resumed: bool) -> list[str]:
        mode = "resume_from_checkpoint" if resumed else "overwrite_output_dir"
        return [*command_of(recipe, self.launch, flags), f"--output_dir={folder}", f"--{mode}=true"]

    def _result(self, run: Run, folder: Path, code: int, seconds: float | None) -> Result:
        """Reads what a run left, and deletes its weights."""
        path, log = folder / "metrics.json", log_of(folder)
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        # accelerate launch turns every exit code but 0 into 1, also that of a run that diverged.
        if metrics is None or (code != 0 and not metrics["diverged"]):
            path.unlink(missing_ok=True)  # the next attempt must not find it
            check_folder(self.output_dir)  # a full disk would fail every run
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            end = "\n".join(text.splitlines()[-LOG_TAIL:])
            refused = code == ExitCode.BAD_INPUT or f"{self.suite.recipe}.py: error: " in text
            reason = {"reason": f"exit code {code}; the end of {log}:\n{end}"}
            return Result(run, "refused" if refused else "failed", seconds=seconds, metrics=reason)
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        if not self.keep_models:
            for item in (item for pattern in WEIGHTS for item in folder.glob(pattern)):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        loss = None if metrics["diverged"] else metrics["eval_loss"]
        state: State = "diverged" if metrics["diverged"] else "done"
        return Result(run, state, loss, metrics.get("diverged_at"), seconds, metrics, history)


def run_folder(output_dir: Path, run: Run) -> Path:
    """The folder of a run."""
    return output_dir / "runs" / sha256(run.key.encode()).hexdigest()[:12]


def log_of(folder: Path) -> Path:
    """The log of the run that has this folder."""
    return folder.with_suffix(".log")


def check_folder(folder: Path) -> None:
    """Makes the folder, and checks that files can be written to it.

    Raises:
        InputError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * ROOM)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(
            f"--output_dir {folder} cannot be written to: {error.strerror}. Make room or give another "
            "folder. Finished runs are kept"
        ) from error


def can_resume(folder: Path) -> bool:
    """Whether a run can continue from its last checkpoint. Deletes checkpoints that are not complete."""
    for checkpoint in checkpoints_of(folder):
        state = read_state(checkpoint)
        if state is not None:
            return bool(state["global_step"] < state["max_steps"])
        shutil.rmtree(checkpoint)
    return False


def _lock(stream: TextIO, stop: Event) -> bool:
    """Locks an open file; False if it was stopped while it waited."""
    while not stop.is_set():
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        stop.wait(LOOK)
    return False


def _wait(command: Sequence[str], log: TextIO, environment: Mapping[str, str], stop: Event) -> int | None:
    """Runs a command to its end and gives its exit code; None if it was stopped."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    try:
        while process.poll() is None and not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
        return process.poll()
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started: first with SIGTERM, then with SIGKILL."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)  # some lead groups of their own
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # the group has ended
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil compares start times: never another process with the same number
    process.wait()
