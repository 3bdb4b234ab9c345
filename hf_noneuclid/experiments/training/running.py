"""What every recipe does with its Trainer: start, check, train, save."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from transformers import PreTrainedModel, Trainer

from hf_noneuclid import DivergedError
from hf_noneuclid.experiments.common import ExitCode, InputError, PushError
from hf_noneuclid.experiments.secrets import redact_arguments, scrub
from hf_noneuclid.experiments.training.checkpoints import read_state
from hf_noneuclid.experiments.training.options import RecipeArguments, parse, read_config
from hf_noneuclid.experiments.training.results import count_parameters, write_metrics


def start(
    recipe: str, argv: Sequence[str] | None, argument_types: Sequence[type], run: Callable[..., None]
) -> None:
    """Parse the options and run a recipe; bad input and divergence end the process with a message.

    Args:
        recipe: name of the script, for messages.
        argv: the command line; None for the one of the process.
        argument_types: dataclasses that the options are parsed into.
        run: is called with them and `invocation`, how the recipe was called.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv, argument_types, recipe)
    shown = {"command": redact_arguments(argv), "config": scrub(read_config(argv))}
    try:
        run(*options, invocation={"recipe": recipe, **shown})
    except InputError as error:
        stop(recipe, f"error: {error}", ExitCode.BAD_INPUT)
    except DivergedError as error:
        stop(recipe, f"diverged: {error}", ExitCode.DIVERGED)
    except PushError as error:
        stop(recipe, f"error: {error}", ExitCode.NOT_PUSHED)
    if dist.is_initialized():  # not before the Trainer is gone: destroying its DDP model afterwards can hang
        dist.destroy_process_group()


def stop(recipe: str, message: str, code: ExitCode) -> NoReturn:
    """End the process with a message in place of a traceback."""
    print(f"{recipe}: {scrub(message)}", file=sys.stderr)
    raise SystemExit(code)


def check_optimizer(args: RecipeArguments, model: PreTrainedModel) -> None:
    """Build the optimizer and throw it away: a wrong option should stop the run before a file is written.

    Raises:
        InputError: an option is unknown or out of range, the method finds nothing to train in the model, or
            the optimizer is of a package that is not installed.
    """
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if "params" in options:  # one of ours; it allocates no state before its first step
            optimizer_class(**options)
    except (ValueError, ImportError) as error:
        raise InputError(f"--optim {args.optim.value}: {error}") from error


def train(trainer: Trainer, checkpoint: str | None, invocation: dict[str, Any]) -> None:
    """Train the steps that a checkpoint leaves; a run that diverges leaves a metrics.json that says so.

    Raises:
        DivergedError: ten steps in a row had a NaN or infinite loss or gradient.
    """
    if trainer.is_world_process_zero():
        parameters = count_parameters(trainer.model)
        print(f"{parameters:,} parameters, vocabulary of {len(trainer.processing_class):,}")
    if checkpoint is not None:
        trainer.steps_done = read_state(Path(checkpoint))["global_step"]
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except DivergedError as error:
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir)
            outcome = {"eval_loss": None, "diverged": True, "diverged_at": error.first_step}
            write_metrics(folder / "history.json", trainer.state.log_history)
            write_metrics(folder / "metrics.json", {**outcome, "reason": str(error), **invocation})
        raise


def save_model(trainer: Trainer) -> None:
    """Write the model and the tokenizer as from_pretrained wants them, on any engine."""
    if trainer.is_fsdp_enabled:  # its checkpoints are shards, which from_pretrained cannot load
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def first_bad_step(history: list[dict[str, Any]]) -> int | None:
    """Return the first step at which a NaN or infinite loss was logged, None if there is none."""
    rows = (row for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0))))
    return next((row["step"] for row in rows), None)


class RecipeTrainer(Trainer):
    """The Trainer with the paper's schedule, and pushes that wait for the results.

    Attributes:
        steps_done: of the checkpoint that the training goes on from.
    """

    steps_done = 0
    _nothing_left = False

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Leave no epoch where all steps are done: in the middle of one, the Trainer would do another."""
        epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        self._nothing_left = 0 < max_steps <= self.steps_done
        return (0 if self._nothing_left else epochs, *others, max_steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, except the mean loss over no steps, which the Trainer takes for 0."""
        if not (self._nothing_left and "train_loss" in logs):
            super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make warmup_stable_decay constant, then linear down to a tenth, unless its options differ."""
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            decay = round(self.args.decay_fraction * num_training_steps)
            decay = min(decay, num_training_steps - self.args.get_warmup_steps(num_training_steps))
            paper = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.1}
            self.args.lr_scheduler_kwargs = {**paper, **(self.args.lr_scheduler_kwargs or {})}
        return super().create_scheduler(num_training_steps, optimizer)
