"""The output folder of a sweep: what its runs leave there, and what is deleted."""

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.sweeping.suite import Run
from hf_noneuclid.experiments.training.checkpoints import checkpoints_of, read_state

LOG_TAIL = 15  # lines kept of a run that failed
ROOM = 1 << 20  # bytes that must fit on the disk
WEIGHTS = ("checkpoint-*", "model*.safetensors*", "pytorch_model*", "adapter_model*")


def run_folder(output_dir: Path, run: Run) -> Path:
    """Return the folder of a run."""
    return output_dir / "runs" / sha256(run.key.encode()).hexdigest()[:12]


def check_folder(folder: Path) -> None:
    """Make the folder, and see whether it takes files.

    Raises:
        InputError: it does not.
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
            "folder; what is done is not lost"
        ) from error


def log_of(folder: Path) -> Path:
    """Return the log of the run of a folder."""
    return folder.with_suffix(".log")


def read_log(path: Path) -> str:
    """Return a log, empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(read_log(path).splitlines()[-LOG_TAIL:])


def can_resume(folder: Path) -> bool:
    """Say whether a run can go on from its last checkpoint; deletes those not written to the end."""
    for checkpoint in checkpoints_of(folder):
        state = read_state(checkpoint)
        if state is not None:
            return state["global_step"] < state["max_steps"]
        shutil.rmtree(checkpoint)
    return False


def delete_weights(folder: Path) -> None:
    """Delete weights and checkpoints: hundreds of them fill a disk."""
    for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
