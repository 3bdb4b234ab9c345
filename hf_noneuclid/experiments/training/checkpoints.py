"""The output folder of a run: its checkpoints, and no files of another run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_noneuclid.experiments.common import InputError, require

if TYPE_CHECKING:
    from hf_noneuclid.experiments.training.options import RecipeArguments

# A folder with one of these holds a run.
RUN_FILES = (
    *("checkpoint-*", "metrics.json", "history.json", "curves.png", "config.json"),
    *("model*.safetensors*", "adapter_*"),
)
# A run also writes these. Those of an earlier run would be loaded with the model of the next one.
COMPANIONS = (
    *("README.md", "training_args.bin", "generation_config.json", "chat_template.jinja"),
    *("additional_chat_templates", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("spm.model", "sentencepiece.bpe.model"),
)
logger = logging.getLogger(__name__)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state, which it writes last, of a checkpoint; None where a kill cut the save off."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the last one first."""
    steps = {path.name.partition("-")[2]: path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int, reverse=True)]


def run_files(folder: Path) -> list[Path]:
    """What a run left in the folder."""
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))


def delete_run(folder: Path) -> None:
    """Deletes a run: an old checkpoint with a higher step would be taken for the next run's last one."""
    found = run_files(folder)
    companions = [folder / name for name in COMPANIONS if found and (folder / name).exists()]
    for path in [*found, *companions]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_folder(folder: Path, is_free: object) -> None:
    """Raises InputError if an output folder is a file, or holds another run and is not to be replaced."""
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    require(file is None, f"--output_dir {folder}: {file} is a file; give another folder")
    found = [] if is_free else run_files(folder)
    if found:
        raise InputError(
            f"--output_dir {folder} holds another run ({found[0].name}). Go on with it: "
            f"--resume_from_checkpoint true; replace it: --overwrite_output_dir; or give another folder"
        )


def find_checkpoint(args: RecipeArguments) -> str | None:
    """The checkpoint to resume from, None to start anew; nothing is written.

    The first process looks, and all take what it found: a file system may show some processes less.
    """
    if args.world_size == 1:
        return _find(args)
    from accelerate.utils import broadcast_object_list  # slow to import, and sweeps import this module

    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [_find(args)]
        except InputError as error:
            found = [error]
    checkpoint: str | InputError | None = broadcast_object_list(found)[0]
    if isinstance(checkpoint, InputError):
        raise checkpoint
    return checkpoint


def _find(args: RecipeArguments) -> str | None:
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if not wanted:
        check_folder(folder, args.overwrite_output_dir)
        return None
    if args.overwrite_output_dir:
        raise InputError("--overwrite_output_dir would delete what --resume_from_checkpoint goes on from")
    checkpoint = _last_whole(folder) if wanted.lower() == "true" else Path(wanted)
    state = read_state(checkpoint)
    if state is None:
        message = f"--resume_from_checkpoint {checkpoint} is not a whole checkpoint"
        raise InputError(f"{message}: it has no trainer_state.json that can be read")
    is_inside = checkpoint.resolve().parent == folder.resolve()
    check_folder(folder, is_inside)
    # After the last step, the results are left to do if the run was killed before it wrote them. There may be
    # those of an earlier end, after which the run went on.
    step, last = state["global_step"], args.max_steps if args.max_steps > 0 else state["max_steps"]
    metrics = folder / "metrics.json"
    written = metrics.is_file() and json.loads(metrics.read_text(encoding="utf-8")).get("steps") == step
    is_left = step < last or (step == last and is_inside and not written)
    require(is_left, f"--resume_from_checkpoint {checkpoint}: all of its {step} steps are done")
    return str(checkpoint)


def _last_whole(folder: Path) -> Path:
    found = checkpoints_of(folder)
    require(found, f"--resume_from_checkpoint true: {folder} holds no checkpoint")
    for path in found:
        if read_state(path) is not None:
            return path
        logger.warning(f"{path} was not written to the end and is skipped")
    raise InputError(
        f"--resume_from_checkpoint true: no checkpoint in {folder} was written to the end, not even "
        f"{found[-1].name}: start anew with --overwrite_output_dir"
    )
