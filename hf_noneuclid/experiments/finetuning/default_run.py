"""What happens without a task: pre-training if need be, then both tasks on the embedded docstrings."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.finetune_options import (
    DEFAULT_MODEL,
    FinetuneArguments,
    FinetuneModelArguments,
)
from hf_noneuclid.experiments.training.options import read_config
from hf_noneuclid.experiments.training.run_folder import check_is_folder, run_files

RECIPES = Path(__file__).parents[1]
# Of the classifier, unless the command line or the --config file says otherwise. The beginning of a docstring
# tells its library, and many of them teach more than a few whole ones; a step has as many tokens as the
# language model's. Its gradients are small, so that a learning rate that suits the language model would
# hardly move it.
CLASSIFIER = (
    "--block_size=64",
    "--per_device_train_batch_size=32",
    "--max_steps=100",
    "--learning_rate=1e-2",
)
OF_THE_FIRST_MODEL = ("model_package", "gguf_file", "tokenizer_name")  # the second is a folder with all of it


def run_default(argv: Sequence[str], model_args: FinetuneModelArguments, args: FinetuneArguments) -> None:
    """Run the commands one after the other, each as a process of its own.

    Raises:
        InputError: an option makes sense for one task alone, or an output folder holds another run.
        SystemExit: a command failed.
    """
    folders = [Path(args.output_dir or "") / name for name in ("docstrings", "library")]
    _check(args, folders)
    for command in [*_pretraining(model_args, args), *_tasks(argv, model_args, folders)]:
        print(f"\n$ python {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            raise SystemExit(code)


def _check(args: FinetuneArguments, folders: Sequence[Path]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("without --task everything runs in one process: name a task to use several")
    for name in ("resume_from_checkpoint", "push_to_hub"):
        if getattr(args, name):
            raise InputError(f"--{name} is for one training: name its --task")
    for folder in folders:
        check_is_folder(folder)
        if run_files(folder) and not args.overwrite_output_dir:
            raise InputError(f"{folder} holds another run: --overwrite_output_dir, or another --output_dir")


def _pretraining(model_args: FinetuneModelArguments, args: FinetuneArguments) -> list[list[str]]:
    """Return the command that makes the default model, unless it is there or another is named."""
    folder = Path(DEFAULT_MODEL)
    if model_args.path != DEFAULT_MODEL or (folder / "config.json").is_file():
        return []
    command = [str(RECIPES / "pretrain.py"), f"--output_dir={DEFAULT_MODEL}"]
    command += ["--use_cpu=true"] if args.use_cpu else []
    command += ["--resume_from_checkpoint=true"] if any(folder.glob("checkpoint-*")) else []
    return [command]


def _tasks(
    argv: Sequence[str], model_args: FinetuneModelArguments, folders: Sequence[Path]
) -> list[list[str]]:
    """Return the commands of the tasks: the options of this one, and what differs after them."""
    script, config = str(RECIPES / "finetune.py"), read_config(argv)
    first, second = map(str, folders)
    merged = ["--lora_merge=true"]  # the classifier is made of a whole model
    classifier = [flag for flag in CLASSIFIER if flag.removeprefix("--").partition("=")[0] not in config]
    # Emptied, not left out: the --config file may name them, too.
    emptied = [f"--{name}=" for name in OF_THE_FIRST_MODEL if getattr(model_args, name)]
    model = [f"--model_name_or_path={first}", "--model_revision=main", *emptied]
    return [
        [script, *argv, "--task=causal_lm", f"--output_dir={first}", *merged],
        [script, *classifier, *argv, "--task=classification", f"--output_dir={second}", *model],
    ]
