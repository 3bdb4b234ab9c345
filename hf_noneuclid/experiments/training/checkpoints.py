"""Which checkpoints of a run were written to the end: a run may be killed in the middle of a save."""

import json
from pathlib import Path
from typing import Any


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the Trainer's state of a checkpoint, which it writes last; None without a whole one."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the Trainer does not write it in one piece
        return None


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, whole or not, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path).isdecimal()]
    return sorted(found, key=lambda path: int(_step(path)), reverse=True)


def _step(path: Path) -> str:
    return path.name.partition("-")[2]
