"""The output folder: one run, and no run's files without being asked."""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from training.options import InputError, RecipeArguments

# What a run writes. A folder with one of these holds a run.
RUN_FILES = (
    *("checkpoint-*", "metrics.json", "history.json", "curves.png", "config.json", "hub_origin.json"),
    *("model*.safetensors*", "adapter_*"),
)


def find_checkpoint(args: RecipeArguments) -> str | None:
    """Return the checkpoint to resume from, None to start anew; nothing is written.

    Raises:
        InputError: there is no such checkpoint, or the output folder holds another run.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file")
    if wanted and args.overwrite_output_dir:
        raise InputError("--overwrite_output_dir would delete what --resume_from_checkpoint goes on from")
    checkpoint = _resolve(folder, wanted, args.max_steps) if wanted else None
    continued = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if run_files(folder) and not continued and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {folder} holds another run ({run_files(folder)[0].name}). Go on with it: "
            f"--resume_from_checkpoint true; replace it: --overwrite_output_dir; or give another folder"
        )
    return None if checkpoint is None else str(checkpoint)


def run_files(folder: Path) -> list[Path]:
    """Return what a run left in the folder."""
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))


def delete_run(folder: Path) -> None:
    """Delete a run: an old checkpoint with a higher step would be taken for this one's last."""
    for path in run_files(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "README.md").unlink(missing_ok=True)  # its card is not the next one's


def _resolve(folder: Path, wanted: str, max_steps: int) -> Path:
    if wanted.lower() != "true":
        checkpoint = Path(wanted)
    elif folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        checkpoint = Path(last)
    else:
        raise InputError(f"--resume_from_checkpoint true: {folder} holds no checkpoint")
    named, state_file = f"--resume_from_checkpoint {checkpoint}", checkpoint / "trainer_state.json"
    if not state_file.is_file():
        raise InputError(f"{named} is no checkpoint: it has no trainer_state.json")
    state = json.loads(state_file.read_text(encoding="utf-8"))
    if state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"]):
        # The Trainer would train one step more.
        raise InputError(f"{named}: all of its {state['global_step']} steps are done")
    return checkpoint
