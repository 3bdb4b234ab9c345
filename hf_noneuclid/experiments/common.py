"""What every part of the experiments uses: errors, whole files, numbers and tables as text, the machine.

Importing this module is quick; torch and matplotlib are not imported with it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------- errors


class ExitCode(IntEnum):
    """The exit codes of recipes and commands, where they are not 0."""

    FAILED = 1  # a training run of several failed, or, as in every Python script, there is a traceback
    BAD_INPUT = 2  # argparse's own
    DIVERGED = 3
    NOT_PUSHED = 4  # the results are on disk
    INTERRUPTED = 130  # a shell's, for Ctrl-C


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""


def require(condition: object, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


class PushError(RuntimeError):
    """Results are on disk but not on the Hub; the message says how to push them later."""


# ---------------------------------------------------------------- files


def recipes_folder() -> Path:
    """The folder of the recipes and suites: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    beside = package.parent / "recipes"
    return beside if (beside / "suites").is_dir() else package / "recipes"


def package_folder(name: str, hint: str) -> Path:
    """The folder of an installed package, which is not imported; the hint ends the message where it lacks."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise InputError(f"there is no package {name}: {hint}")
    return Path(found.origin).parent


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary file beside ``path`` and renames it: no reader sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp lets only the owner read its files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with None, which JSON can hold, for every NaN or infinity in it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- text


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells must be free of line breaks and unescaped bars."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def option_pairs(text: str | None) -> dict[str, str]:
    """The options in a value of ``--optim_args``, as text; empty where the flag was not given."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    return {name.strip(): value.strip() for name, _, value in pairs}


# ---------------------------------------------------------------- figures

# The colours of Okabe and Ito can be told apart with any colour vision.
BLUE, VERMILION = "#0072B2", "#D55E00"
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

History = list[dict[str, Any]]
"""The log history of a Trainer."""


def series(history: History, key: str) -> tuple[list[int], list[float]]:
    """The steps and values of one key of a log history, without the null that stands for NaN in JSON."""
    rows = [entry for entry in history if entry.get(key) is not None]
    return [row["step"] for row in rows], [float(row[key]) for row in rows]


# ---------------------------------------------------------------- the machine


def describe_commit() -> dict[str, Any]:
    """The commit of the checkout that holds the package, and whether it is clean; nothing in a wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {}
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):  # there is no git, or it does not trust the folder
        return {}
    return {"commit": {"id": commit.strip(), "clean": not changes}}


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The names of the processor and the GPU, the threads of this process, and the version of torch."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
