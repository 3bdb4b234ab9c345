"""What a run leaves behind besides the model: metrics.json, history.json, curves.png, a sample of text."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate.logging import get_logger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_noneuclid.experiments import common
from hf_noneuclid.experiments.common import series
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.training.data import Corpus
from hf_noneuclid.experiments.training.options import FinetuneArguments, PretrainArguments

logger = get_logger(__name__)
PACKAGES = ("hf_noneuclid", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def write_results(trainer: Trainer, data: Corpus, loss: float, results: dict[str, Any]) -> None:
    """Writes history.json, curves.png and at last metrics.json, which says that the run has finished.

    Args:
        trainer: A ``RecipeTrainer`` after training; its ``facts`` are kept, too.
        data: The ``Blocks`` that it was trained and evaluated on.
        loss: The mean loss over all of the validation part, in nats.
        results: What else was measured.
    """
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    corpus = {
        "name": data.name,
        "license": data.license,
        "train_sha256": data.train.sha256,
        "train_tokens": data.train.tokens,
        "validation_sha256": data.validation.sha256,
        "validation_tokens": data.validation.tokens,
        "validation_blocks": len(data.validation.dataset),
    }
    metrics = {**describe_run(trainer, loss), **results, "corpus": corpus}
    if metrics["diverged"]:
        rows = (row for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0))))
        metrics["diverged_at"] = next((row["step"] for row in rows), None)
    write_metrics(folder / "history.json", history)
    plot_curves(folder / "curves.png", history)
    write_metrics(folder / "metrics.json", {**metrics, **trainer.facts})


def describe_run(trainer: Trainer, loss: float) -> dict[str, Any]:
    """What is known of any finished run: losses, steps, parameters, hardware, versions.

    The losses along the way are over the few sequences that are evaluated while training, so they may lie
    above or below ``eval_loss``, which is over all of the validation part.
    """
    history = trainer.state.log_history
    train_losses = series(history, "loss")[1]
    along = [
        (loss, step) for step, loss in zip(*series(history, "eval_loss"), strict=True) if math.isfinite(loss)
    ]
    best_loss, best_step = min(along, default=(None, None))
    return {
        "eval_loss": loss,
        "eval_loss_along_the_way": along[-1][0] if along else None,
        "best_eval_loss_along_the_way": best_loss,
        "best_eval_step": best_step,
        "train_loss": train_losses[-1] if train_losses else None,
        "diverged": not math.isfinite(loss),
        "steps": trainer.state.global_step,
        "parameters": count_parameters(trainer.model),
        "hardware": {**common.describe_hardware(trainer.args.device), "processes": trainer.args.world_size},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def count_parameters(model: torch.nn.Module, trained_only: bool = False) -> int:
    """The number of parameters of the whole model, also where ZeRO-3 has spread them over the processes."""
    counted = (weight for weight in model.parameters() if weight.requires_grad or not trained_only)
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in counted)


def write_metrics(path: Path, metrics: Any) -> None:
    """Writes JSON, whole or not at all; a NaN or infinity becomes null, which JSON has."""
    text = json.dumps(common.finite(scrub(metrics)), indent=2, allow_nan=False) + "\n"
    common.write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- a sample of text


def show_sample(folder: Path, prompt: str, args: PretrainArguments | FinetuneArguments, loss: float) -> None:
    """Prints how the saved model continues a prompt, unless it diverged or ``--sample_tokens`` is 0.

    The model is loaded from the folder as a user would load it; the same seed gives the same text. A prompt
    that would leave the sample less than half of the model's positions loses its beginning.
    """
    if args.sample_tokens <= 0 or not math.isfinite(loss):
        return
    prompt = args.prompt or prompt
    tokenizer, model = AutoTokenizer.from_pretrained(folder), _saved_model(folder).to(args.device)
    torch.manual_seed(args.seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    kept = given = inputs["input_ids"].shape[1]
    new = args.sample_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:  # recurrent models have none, nor have those that weigh distances
        new = min(new, max(positions - given, positions // 2))
        kept = min(given, positions - new)
    if kept < given:
        logger.warning(f"the sample's prompt of {given} tokens leaves no room: only its last {kept} are used")
    tokens = model.generate(
        **{name: values[:, given - kept :].to(args.device) for name, values in inputs.items()},
        max_new_tokens=new,
        do_sample=True,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(f"\nSample, from {prompt!r} on:\n{tokenizer.decode(tokens[0])}\n")


def _saved_model(folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    # Slow to import, and the only class that takes the revision of an adapter's base.
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------- curves


def plot_curves(path: Path, history: common.History) -> None:
    """Draws losses, and learning rate with the step size where there is one, against the step: a PNG file."""
    with matplotlib.rc_context(common.STYLE):
        figure = Figure(figsize=(6.8, 2.6), layout="constrained")
        losses, rates = figure.subplots(1, 2)
        _draw(losses, history, {"loss": "training", "eval_loss": "evaluation"})
        losses.set_ylabel("loss (nats)")
        _draw(rates, history, {"learning_rate": "learning rate", "step_size": "step size τ"})
        rates.set_ylabel("learning rate, step size")
        if any(value > 0 for value in series(history, "learning_rate")[1]):
            rates.set_yscale("log")
        common.write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=200))


def _draw(axes: Axes, history: common.History, labels: dict[str, str]) -> None:
    for (key, label), (colour, line) in zip(
        labels.items(), ((common.BLUE, "-"), (common.VERMILION, "--")), strict=True
    ):
        steps, values = series(history, key)
        if steps:
            marker = "o" if key == "eval_loss" else None
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=3, lw=1.2, label=label)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_lines():
        axes.legend()
