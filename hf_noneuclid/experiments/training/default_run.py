"""The default run of finetune.py: a language model and then a classifier of the embedded docstrings."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_noneuclid.experiments.common import recipes_folder, require
from hf_noneuclid.experiments.secrets import redact_arguments
from hf_noneuclid.experiments.training.checkpoints import check_folder
from hf_noneuclid.experiments.training.options import DEFAULT_MODEL, given

# Of the classifier, unless the user says otherwise. The beginning of a docstring tells its library, and many
# beginnings teach more than a few whole ones; a step has as many tokens as the language model's.
CLASSIFIER = {"block_size": 64, "per_device_train_batch_size": 32, "max_steps": 100}
PLAIN_LEARNING_RATE = 1e-2  # gradients are small: what suits the language model would hardly move it
FIRST_MODEL = {"model_package": None, "gguf_file": None, "tokenizer_name": None, "model_revision": None}


def run_default(argv: Sequence[str], model_args: Any, args: Any) -> None:
    """Runs pretrain.py if its model is not there, finetune.py and classify.py, each as a process of its own.

    classify.py takes the options of the command line of finetune.py that it knows.

    Raises:
        InputError: An option makes sense for one training alone, or an output folder holds another run.
        SystemExit: A command failed.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    require(alone, "without --task everything runs in one process: give --task causal_lm to use several")
    for name in ("resume_from_checkpoint", "push_to_hub"):
        message = f"--{name} is for one training: give --task causal_lm, or run classify.py"
        require(not getattr(args, name), message)
    folder = Path(args.output_dir)
    first, second = folder / "docstrings", folder / "library"
    for output in (first, second):
        check_folder(output, args.overwrite_output_dir)

    argv = redact_arguments(argv)  # the environment has the token
    commands = [["finetune.py", *argv, "--task=causal_lm", f"--output_dir={first}", "--lora_merge=true"]]
    if model_args.path == DEFAULT_MODEL and not (Path(DEFAULT_MODEL) / "config.json").is_file():
        started = any(Path(DEFAULT_MODEL).glob("checkpoint-*"))
        more = ["--use_cpu=true"] * args.use_cpu + ["--resume_from_checkpoint=true"] * started
        commands.insert(0, ["pretrain.py", f"--output_dir={DEFAULT_MODEL}", *more])
    model = {**FIRST_MODEL, "model_name_or_path": str(first)}
    options = {**CLASSIFIER, **given(argv, "finetune", "classify"), **model, "output_dir": str(second)}
    if args.learning_rate is None:
        options["learning_rate"] = PLAIN_LEARNING_RATE
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "library.yaml"
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    commands.append(["classify.py", f"--config={config}"])
    for script, *flags in commands:
        command = [os.path.relpath(recipes_folder() / script), *flags]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            raise SystemExit(code)
