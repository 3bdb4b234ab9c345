"""What a run leaves behind besides the model: metrics.json and curves.png."""

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate.logging import get_logger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, Trainer

from hf_noneuclid.experiments.common import (
    BLUE,
    STYLE,
    VERMILION,
    History,
    describe_hardware,
    finite,
    series,
    write_whole,
)
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.training.options import RecipeArguments
from hf_noneuclid.experiments.training.packing import Data

logger = get_logger(__name__)
PACKAGES = ("hf_noneuclid", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def block_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each block of a batch, all that the Trainer then keeps of the logits.

    The Trainer's own evaluation loss is a mean over batches, the last filled up with earlier blocks:
    its value depends on the number of devices.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none").mean(dim=1)


def summarise(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the mean loss in nats per token, and the perplexity, from the `block_losses`."""
    loss = float(evaluation.predictions.mean(dtype="float64"))
    return {"loss": loss, "perplexity": perplexity(loss)}


def count_parameters(model: torch.nn.Module, trained_only: bool = False) -> int:
    """Count the parameters as the model has them, whole: of what ZeRO-3 has taken away, too."""
    counted = (weight for weight in model.parameters() if weight.requires_grad or not trained_only)
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in counted)


def collect_metrics(trainer: Trainer, final_loss: float, data: Data) -> dict[str, Any]:
    """Return the results of a run.

    Args:
        trainer: after training.
        final_loss: mean loss over all of the validation part, in nats per token.
        data: what it was trained and evaluated on.

    Returns:
        `eval_loss` and what follows from it are over all of the validation part, at the end. The losses along
        the way are over the evenly spread blocks evaluated while training, so they may lie above or below.
    """
    validation, block_size = data.validation, len(data.validation.dataset[0]["input_ids"])
    return {
        **describe_run(trainer, final_loss),
        "perplexity": perplexity(final_loss),
        "bits_per_byte": final_loss / math.log(2) * validation.tokens / validation.utf8_bytes,
        "tokens": trainer.state.global_step * trainer.args.sequences_per_step * block_size,
        "corpus": describe_corpus(data),
    }


def describe_run(trainer: Trainer, final_loss: float) -> dict[str, Any]:
    """Return what is known of any finished run: losses, steps, parameters, hardware, versions."""
    history = trainer.state.log_history
    train_losses = series(history, "loss")[1]
    along = [
        (loss, step) for step, loss in zip(*series(history, "eval_loss"), strict=True) if math.isfinite(loss)
    ]
    best_loss, best_step = min(along, default=(None, None))
    return {
        "eval_loss": final_loss,
        "eval_loss_along_the_way": along[-1][0] if along else None,
        "best_eval_loss_along_the_way": best_loss,
        "best_eval_step": best_step,
        "train_loss": train_losses[-1] if train_losses else None,
        "diverged": not math.isfinite(final_loss),
        "steps": trainer.state.global_step,
        "parameters": count_parameters(trainer.model),
        "hardware": {**describe_hardware(trainer.args.device), "processes": trainer.args.world_size},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def describe_corpus(data: Data) -> dict[str, Any]:
    """Return what tells one corpus from another: its name, hashes of its parts, and their sizes."""
    train, validation = data.train, data.validation
    return {
        "name": data.name,
        "license": data.license,
        "train_sha256": train.sha256,
        "train_tokens": train.tokens,
        "validation_sha256": validation.sha256,
        "validation_tokens": validation.tokens,
        "validation_blocks": len(validation.dataset),
    }


def perplexity(loss: float) -> float:
    """Return e to the loss, finite for any loss that is."""
    return math.exp(min(loss, 700.0))


def sample(folder: Path, prompt: str, args: RecipeArguments) -> str:
    """Continue the prompt with the saved model, as a user would load it; the same text for the same seed.

    The text is as long as --sample_tokens says, or as the model's positions allow. A prompt that would leave
    it less than half of them loses its beginning.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _saved_model(folder).to(args.device)
    torch.manual_seed(args.seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    given = inputs["input_ids"].shape[1]
    kept, new = _share_positions(model, given, args.sample_tokens)
    if kept < given:
        logger.warning(f"the sample's prompt of {given} tokens leaves no room: only its last {kept} are used")
    tokens = model.generate(
        **{name: values[:, given - kept :].to(args.device) for name, values in inputs.items()},
        max_new_tokens=new,
        do_sample=True,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0])


def _saved_model(folder: Path) -> torch.nn.Module:
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    # Slow to import, and the one that takes the revision of an adapter's base.
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder)


def _share_positions(model: torch.nn.Module, given: int, wanted: int) -> tuple[int, int]:
    """Return how many tokens of a prompt are kept, and how many follow them."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:  # a recurrent model's, or one's that weighs distances
        return given, wanted
    new = min(wanted, max(positions - given, positions // 2))
    return min(given, positions - new), new


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write metrics as JSON, whole or not at all; a NaN or infinity becomes null, which JSON has."""
    text = json.dumps(finite(scrub(metrics)), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plot_curves(path: Path, history: History) -> None:
    """Draw losses, and learning rate with the step size where there is one, against the step.

    Args:
        path: PNG file, written whole or not at all.
        history: the Trainer's log history.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 2.6), layout="constrained")
        losses, rates = figure.subplots(1, 2)
        _draw(losses, history, {"loss": "training", "eval_loss": "evaluation"})
        losses.set_ylabel("loss (nats)")
        _draw(rates, history, {"learning_rate": "learning rate", "step_size": "step size τ"})
        rates.set_ylabel("learning rate, step size")
        if any(value > 0 for value in series(history, "learning_rate")[1]):
            rates.set_yscale("log")
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=200))


def _draw(axes: Axes, history: History, labels: dict[str, str]) -> None:
    for (key, label), (colour, line) in zip(labels.items(), ((BLUE, "-"), (VERMILION, "--")), strict=True):
        steps, values = series(history, key)
        if steps:
            marker = "o" if key == "eval_loss" else None
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=3, lw=1.2, label=label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_lines():
        axes.legend()
