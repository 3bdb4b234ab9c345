"""The output folder: one run, and no run's files without being asked."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from hf_noneuclid.experiments.training.checkpoints import checkpoints_of, read_state
from hf_noneuclid.experiments.training.options import InputError, RecipeArguments

logger = get_logger(__name__)
# What a run writes. A folder with one of these holds a run.
RUN_FILES = (
    *("checkpoint-*", "metrics.json", "history.json", "curves.png", "config.json", "hub_origin.json"),
    *("model*.safetensors*", "adapter_*"),
)
# What else it writes: left of an earlier run, the next one's model would be loaded with it.
COMPANIONS = (
    *("README.md", "training_args.bin", "generation_config.json", "chat_template.jinja"),
    *("additional_chat_templates", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("spm.model", "sentencepiece.bpe.model"),
)


def find_checkpoint(args: RecipeArguments) -> str | None:
    """Return the checkpoint to resume from, None to start anew; nothing is written.

    The first process looks, and all take what it found: file systems do not show everyone the same at once.

    Raises:
        InputError: there is no such checkpoint, or the output folder holds another run.
    """
    if args.world_size == 1:
        return _find(args)
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [_find(args)]
        except InputError as error:
            found = [error]
    checkpoint = broadcast_object_list(found)[0]
    if isinstance(checkpoint, InputError):
        raise checkpoint
    if checkpoint is not None and read_state(Path(checkpoint)) is None:
        raise InputError(f"process {args.process_index} cannot read {checkpoint}: all need the same folder")
    return checkpoint


def _find(args: RecipeArguments) -> str | None:
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    check_is_folder(folder)
    if wanted and args.overwrite_output_dir:
        raise InputError("--overwrite_output_dir would delete what --resume_from_checkpoint goes on from")
    checkpoint = _resolve(folder, wanted) if wanted else None
    continued = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if checkpoint is not None:
        _check_steps(checkpoint, args.max_steps, folder if continued else None)
    if run_files(folder) and not continued and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir {folder} holds another run ({run_files(folder)[0].name}). Go on with it: "
            f"--resume_from_checkpoint true; replace it: --overwrite_output_dir; or give another folder"
        )
    return None if checkpoint is None else str(checkpoint)


def check_is_folder(folder: Path) -> None:
    """Check that an output folder is one, or can be made.

    Raises:
        InputError: it is a file, or under one.
    """
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise InputError(f"--output_dir {folder}: {file} is a file; give another folder")


def run_files(folder: Path) -> list[Path]:
    """Return what a run left in the folder."""
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))


def delete_run(folder: Path) -> None:
    """Delete a run: an old checkpoint with a higher step would be taken for this one's last."""
    found = run_files(folder)
    companions = [folder / name for name in COMPANIONS if found and (folder / name).exists()]
    for path in [*found, *companions]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resolve(folder: Path, wanted: str) -> Path:
    checkpoint = _last_whole(folder) if wanted.lower() == "true" else Path(wanted)
    if read_state(checkpoint) is None:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is no whole checkpoint: it has no trainer_state.json "
            "that can be read"
        )
    return checkpoint


def _check_steps(checkpoint: Path, max_steps: int, folder: Path | None) -> None:
    """Check that something is left to do: steps, or the results of a run that was killed after its last one.

    Args:
        checkpoint: a whole one.
        max_steps: of the run, not positive where its epochs count.
        folder: of the run the checkpoint belongs to, None if that is not the one that goes on.
    """
    state = read_state(checkpoint)
    step, last = state["global_step"], max_steps if max_steps > 0 else state["max_steps"]
    if step < last or (step == last and folder is not None and not _has_results(folder, step)):
        return
    raise InputError(f"--resume_from_checkpoint {checkpoint}: all of its {step} steps are done")


def _has_results(folder: Path, step: int) -> bool:
    """Say whether a run wrote its results: not those of an earlier end, after which it went on."""
    metrics = folder / "metrics.json"  # which is written last, and whole
    return metrics.is_file() and json.loads(metrics.read_text(encoding="utf-8")).get("steps") == step


def _last_whole(folder: Path) -> Path:
    found = checkpoints_of(folder)
    if not found:
        raise InputError(f"--resume_from_checkpoint true: {folder} holds no checkpoint")
    whole = next((path for path in found if read_state(path) is not None), None)
    if whole is None:
        raise InputError(
            f"--resume_from_checkpoint true: no checkpoint in {folder} was written to the end, not even "
            f"{found[-1].name}: start anew with --overwrite_output_dir"
        )
    for path in found[: found.index(whole)]:
        logger.warning(f"{path} was not written to the end and is skipped: going on from {whole.name}")
    return whole
