"""How the recipes run: exit codes, checks before training, and their Trainer."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from hf_noneuclid import DivergedError
from hf_noneuclid.experiments.common import ExitCode, InputError, PushError
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.training.checkpoints import delete_run, read_state
from hf_noneuclid.experiments.training.options import RecipeArguments
from hf_noneuclid.experiments.training.results import count_parameters, write_metrics

# The word in the message and the exit code of the errors after which the user has to act.
EXITS: dict[type[Exception], tuple[str, ExitCode]] = {
    InputError: ("error", ExitCode.BAD_INPUT),
    DivergedError: ("diverged", ExitCode.DIVERGED),
    PushError: ("error", ExitCode.NOT_PUSHED),
}


@contextmanager
def exit_codes(recipe: str) -> Iterator[None]:
    """Ends the process with a message and an exit code, not with a traceback, where the user has to act.

    As a decorator it also leaves the process group, when the function has returned and its Trainer is gone:
    destroying a DDP model after its group can hang.
    """
    try:
        yield
    except tuple(EXITS) as error:
        word, code = EXITS[type(error)]
        print(f"{recipe}: {scrub(f'{word}: {error}')}", file=sys.stderr)
        raise SystemExit(code) from error
    if dist.is_initialized():
        dist.destroy_process_group()


def check_optimizer(args: RecipeArguments, model: PreTrainedModel) -> None:
    """Raises InputError if the optimizer cannot be built, so that no file is written before that is known."""
    try:
        if args.peer:
            peer_of(args)
            return
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if "route" in options:  # one of ours; it allocates no state before its first step
            optimizer_class(model.parameters(), **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"--optim {args.method}: {error}") from error


def peer_of(args: RecipeArguments) -> tuple[type, dict[str, Any]]:
    """The class of the optimizer that ``--peer`` names, and its arguments, for the Trainer."""
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if args.peer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy, {**options, "safeguard_warmup": args.warmup_steps > 0}
    from momo import MomoAdam

    class MomoAdamOfTrainer(MomoAdam):
        """MoMo-Adam, which finds the loss of the step in an attribute that RecipeTrainer sets."""

        loss: Any = None

        def step(self, closure: Any = None) -> Any:
            return super().step(loss=self.loss)

    return MomoAdamOfTrainer, options


class RecipeTrainer(Trainer):
    """The Trainer with the paper's schedule; its ``facts`` are what metrics.json says beside the results."""

    def __init__(self, *, facts: dict[str, Any], **arguments: Any) -> None:
        if arguments["args"].peer:
            arguments["optimizer_cls_and_kwargs"] = peer_of(arguments["args"])
        super().__init__(**arguments)
        self.facts = facts
        self._steps_done, self._window_is_over = 0, True

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Trains the steps that a checkpoint leaves; deletes an old run first, if it may."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            if self.args.overwrite_output_dir:
                delete_run(folder)
            vocabulary = f", vocabulary of {len(self.processing_class):,}" if self.processing_class else ""
            print(f"{count_parameters(self.model):,} parameters{vocabulary}")
        self.accelerator.wait_for_everyone()
        state = read_state(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        self._steps_done = state["global_step"] if state else 0
        try:
            return super().train(resume_from_checkpoint, **options)
        except DivergedError as error:
            if self.is_world_process_zero():
                outcome = {"eval_loss": None, "diverged": True, "diverged_at": error.first_step}
                write_metrics(folder / "history.json", self.state.log_history)
                write_metrics(folder / "metrics.json", {**outcome, "reason": str(error), **self.facts})
            raise

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Leaves no epoch where all steps are done: the Trainer would do one more step in the middle."""
        epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        return (0 if 0 < max_steps <= self._steps_done else epochs, *others, max_steps)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Hands the loss to the one peer that takes it, of all the batches that are accumulated."""
        loss = super().training_step(*args, **kwargs)
        if self.args.peer == "momo_adam":
            momo = self.optimizer.optimizer
            momo.loss = loss if self._window_is_over else momo.loss + loss
            self._window_is_over = self.accelerator.sync_gradients
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, except the mean loss over no steps, which the Trainer takes for 0."""
        if "train_loss" not in logs or self.state.global_step > self._steps_done:
            super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes warmup_stable_decay constant, then linear down to a tenth, unless its options differ."""
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            decay = round(self.args.decay_fraction * num_training_steps)
            decay = min(decay, num_training_steps - self.args.get_warmup_steps(num_training_steps))
            paper = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.1}
            self.args.lr_scheduler_kwargs = {**paper, **(self.args.lr_scheduler_kwargs or {})}
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model for from_pretrained, on any engine; the recipe pushes it later, with its card."""
        if self.is_fsdp_enabled and not _internal_call:  # its checkpoints are shards
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint, except of a diverged run: its weights are of no use."""
        last = {name: value for row in self.state.log_history for name, value in row.items()}
        if all(math.isfinite(last.get(name, 0.0)) for name in ("loss", "eval_loss")):
            super()._push_from_checkpoint(checkpoint_folder)


BEFORE, AFTER = "before", "final"  # of the names of metrics in the log history
MEASURED = ("loss", "perplexity", "accuracy", "macro_f1")


class BeforeAndAfter(TrainerCallback):
    """Measures what a model can do before and after fine-tuning; the log history keeps it.

    Args:
        trainer: The Trainer that evaluates.
        parts: Datasets by the prefix of their metrics: ``""`` for the validation part, ``"old_domain_"``.
    """

    def __init__(self, trainer: Trainer, parts: Mapping[str, Any]) -> None:
        self.trainer, self.parts = trainer, parts

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Evaluates, unless the training resumes; not earlier, as the engine has now prepared the model."""
        if state.global_step == 0:
            self.evaluate(BEFORE)

    def evaluate(self, moment: str = AFTER) -> float:
        """Evaluates on all parts; the mean loss on the validation part, in nats."""
        for name, dataset in self.parts.items():
            self.trainer.evaluate(dataset, metric_key_prefix=f"{moment}_{name}".rstrip("_"))
        return self._recall(moment)["loss"]

    def results(self) -> dict[str, Any]:
        """The metrics after fine-tuning, and those of both moments, for metrics.json."""
        after = self._recall(AFTER)
        plain = {name: value for name, value in after.items() if name != "loss"}
        return {**plain, "before": self._recall(BEFORE), "after": after}

    def table(self) -> str:
        """The metrics before and after, one a line."""
        before, rows = self._recall(BEFORE), [f"{'':24}{'before':>10}{'after':>10}"]
        for name, value in self._recall(AFTER).items():
            rows.append(f"{name.replace('_', ' '):24}{before.get(name, math.nan):10.4f}{value:10.4f}")
        return "\n".join(rows)

    def _recall(self, moment: str) -> dict[str, float]:
        """What was measured at a moment; a resumed run finds it in the history of its checkpoint."""
        found = {key: value for row in self.trainer.state.log_history for key, value in row.items()}
        names = [f"{part}{name}" for part in self.parts for name in MEASURED]
        return {name: found[f"{moment}_{name}"] for name in names if f"{moment}_{name}" in found}
