"""What a run leaves behind besides the model: metrics.json, history.json, curves.png, a sample of text."""

import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, Trainer

from hf_noneuclid.experiments import common
from hf_noneuclid.experiments.common import series
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.training.data import Corpus
from hf_noneuclid.experiments.training.options import FinetuneArguments, PretrainArguments
from hf_noneuclid.log import limited_steps

PACKAGES = ("hf_noneuclid", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def write_results(trainer: Trainer, data: Corpus, loss: float, results: dict[str, Any]) -> None:
    """Writes history.json, curves.png and at last metrics.json, which says that the run has finished.

    ``loss`` is the mean over all of the validation part, in nats; the losses along the way are over the few
    sequences that are evaluated while training. ``results`` is what else was measured.
    """
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    train_losses = series(history, "loss")[1]
    evaluations = zip(*series(history, "eval_loss"), strict=True)
    along = [(value, step) for step, value in evaluations if math.isfinite(value)]
    best_loss, best_step = min(along, default=(None, None))
    metrics = {
        "eval_loss": loss,
        "eval_loss_along_the_way": along[-1][0] if along else None,
        "best_eval_loss_along_the_way": best_loss,
        "best_eval_step": best_step,
        "train_loss": train_losses[-1] if train_losses else None,
        "diverged": not math.isfinite(loss),
        "steps": trainer.state.global_step,
        "limited_steps": limited_steps(history),
        "parameters": count_parameters(trainer.model),
        "hardware": {**common.describe_hardware(trainer.args.device), "processes": trainer.args.world_size},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "corpus": {
            "name": data.name,
            "license": data.license,
            "train_sha256": data.train.sha256,
            "train_tokens": data.train.tokens,
            "validation_sha256": data.validation.sha256,
            "validation_tokens": data.validation.tokens,
            "validation_blocks": len(data.validation.dataset),
        },
        **results,
    }
    if metrics["diverged"]:
        rows = (row for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0))))
        metrics["diverged_at"] = next((row["step"] for row in rows), None)
    write_metrics(folder / "history.json", history)
    plot_curves(folder / "curves.png", history)
    write_metrics(folder / "metrics.json", {**metrics, **trainer.facts})


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

    The model is loaded from the folder as a user would load it; the same seed gives the same text. A long
    prompt loses its beginning, so that prompt and sample fit into the model's positions.
    """
    if args.sample_tokens <= 0 or not math.isfinite(loss):
        return
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as AutoModel  # slow to import; knows the base's revision
    else:
        from transformers import AutoModelForCausalLM as AutoModel
    model = AutoModel.from_pretrained(folder).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    prompt, new = args.prompt or prompt, args.sample_tokens
    # Recurrent models have no positions, nor have those that weigh distances.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = max(positions - new, positions // 2)
    inputs = tokenizer(
        prompt, return_tensors="pt", return_token_type_ids=False, truncation=True, max_length=room
    )
    torch.manual_seed(args.seed)
    tokens = model.generate(
        **inputs.to(args.device),
        max_new_tokens=min(new, positions - inputs["input_ids"].shape[1]),
        do_sample=True,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(f"\nSample, from {prompt!r} on:\n{tokenizer.decode(tokens[0])}\n")


# ---------------------------------------------------------------- curves


def plot_curves(path: Path, history: common.History) -> None:
    """Draws losses, and learning rate with the step size where there is one, against the step: a PNG file."""
    with matplotlib.rc_context(common.STYLE):
        figure = Figure(figsize=(6.8, 2.6), layout="constrained")
        losses, rates = figure.subplots(1, 2)
        losses.set(xlabel="step", ylabel="loss (nats)")
        losses.plot(*series(history, "loss"), color=common.BLUE, label="training")
        losses.plot(*series(history, "eval_loss"), "o--", color=common.VERMILION, label="evaluation")
        rates.set(xlabel="step", ylabel="learning rate, step size")
        rates.plot(*series(history, "learning_rate"), color=common.BLUE, label="learning rate")
        steps, sizes = series(history, "step_size")
        if steps:
            rates.plot(steps, sizes, "--", color=common.VERMILION, label="step size τ")
        if any(value > 0 for value in series(history, "learning_rate")[1]):
            rates.set_yscale("log")
        for axes in (losses, rates):
            axes.legend()
        common.write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=200))
