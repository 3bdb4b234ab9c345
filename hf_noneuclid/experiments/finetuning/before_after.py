"""What a model can do before and after fine-tuning."""

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_noneuclid.experiments.common import History
from hf_noneuclid.experiments.finetuning.tasks import Task

BEFORE, AFTER = "before", "final"  # of the names of metrics in the log history
OLD_DOMAIN = "old_domain"
MEASURED = ("loss", "perplexity", "accuracy", "macro_f1")


def evaluate(trainer: Trainer, task: Task, moment: str) -> dict[str, float]:
    """Evaluate on all of the validation part, and of the old domain; the log history keeps it.

    Args:
        trainer: with the model.
        task: with the data.
        moment: `BEFORE` or `AFTER`.

    Returns:
        Of `MEASURED` what there is, those of the old domain with `old_domain_` before them.
    """
    trainer.evaluate(task.data.validation.dataset, metric_key_prefix=moment)
    if task.old_domain is not None:
        trainer.evaluate(task.old_domain.dataset, metric_key_prefix=f"{moment}_{OLD_DOMAIN}")
    return recall(trainer.state.log_history, moment)


def recall(history: History, moment: str) -> dict[str, float]:
    """Return what was measured at a moment; a resumed run finds it in the history of its checkpoint."""
    wanted = [*MEASURED, *(f"{OLD_DOMAIN}_{name}" for name in MEASURED)]
    found = {key: value for row in history for key, value in row.items()}
    return {name: found[f"{moment}_{name}"] for name in wanted if f"{moment}_{name}" in found}


class EvaluateFirst(TrainerCallback):
    """Evaluates at the start of the training: not sooner, since engines prepare the model there."""

    def __init__(self, measure: Callable[[], Any]) -> None:
        self.measure = measure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate, unless the training goes on from a checkpoint."""
        if state.global_step == 0:
            self.measure()


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Return the metrics before and after, one a line."""
    lines = [f"{'':24}{'before':>10}{'after':>10}"]
    for name, value in after.items():
        first = f"{before[name]:10.4f}" if name in before else f"{'':10}"
        lines.append(f"{name.replace('_', ' '):24}{first}{value:10.4f}")
    return "\n".join(lines)
