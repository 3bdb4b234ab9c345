"""Pre-train a causal language model with non-Euclidean gradient descent.

    python recipes/pretrain.py
    accelerate launch recipes/pretrain.py --config recipes/configs/fineweb_124m.yaml --learning_rate 3e-3

With no arguments a small GPT-2 trains on the embedded corpus with MuonMax-Momo; two CPU cores need a few
minutes.
"""

import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_noneuclid.log import show_log  # the package makes its methods values of --optim

from training.corpus import load_corpus
from training.model import load_config, load_model, load_tokenizer
from training.options import DataArguments, InputError, ModelArguments, RecipeArguments, parse, read_config
from training.packing import Data, collate, pack, pack_lazily, spread
from training.results import (
    block_losses,
    collect_metrics,
    count_parameters,
    plot_curves,
    sample,
    summarise,
    write_metrics,
)
from training.run_folder import delete_run, find_checkpoint

EXIT_BAD_INPUT, EXIT_DIVERGED = 2, 3
DIVERGED = "in a row had a NaN or infinite"  # hf_noneuclid's word for a run that cannot go on


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; `argv` is by default the command line of the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    try:
        run(*options, invocation={"command": argv, "config": read_config(argv)})
    except InputError as error:
        stop(f"error: {error}", EXIT_BAD_INPUT)
    if dist.is_initialized():  # not before the Trainer is gone: destroying its DDP model afterwards can hang
        dist.destroy_process_group()


def run(
    model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments, invocation: dict[str, Any]
) -> None:
    """Prepare data and model, train, evaluate, and write the results.

    Args:
        model_args: which model and tokenizer.
        data_args: which text.
        args: how to train.
        invocation: how the recipe was called, for metrics.json.
    """
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the data"):
        data, config = prepare(model_args, data_args, args)
    model = load_model(model_args, config)
    check_optimizer(args, model)
    show_log()  # not before: the check above routes the parameters, too

    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=data.train.dataset,
        eval_dataset=spread(data.validation.dataset, data_args.eval_blocks),
        processing_class=data.tokenizer,
        data_collator=collate,
        preprocess_logits_for_metrics=block_losses,
        compute_metrics=summarise,
    )
    if trainer.is_world_process_zero() and args.overwrite_output_dir:
        delete_run(Path(args.output_dir))
    trainer.accelerator.wait_for_everyone()

    start = time.perf_counter()
    train(trainer, checkpoint, invocation)
    final = trainer.evaluate(data.validation.dataset, metric_key_prefix="final")
    seconds = round(time.perf_counter() - start, 1)
    save_model(trainer)
    if trainer.is_world_process_zero():
        options = {**vars(model_args), **vars(data_args), **args.changed()}
        facts = {"seconds": seconds, "resumed_from": checkpoint, **invocation, "options": options}
        write_results(trainer, data, final, facts)
    trainer.accelerator.wait_for_everyone()


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments
) -> tuple[Data, PretrainedConfig]:
    """Load the text, make blocks of tokens of it, and configure the model that fits them."""
    block_size = data_args.block_size
    if data_args.streaming and args.max_steps < 1:
        raise InputError("a stream has no known length: --streaming needs --max_steps")
    corpus = load_corpus(data_args, args.data_seed)
    tokenizer = load_tokenizer(model_args, corpus.train, block_size)
    config = load_config(model_args, tokenizer, block_size)
    train_blocks = pack_lazily(corpus.train, tokenizer, block_size)
    validation = pack(corpus.validation, tokenizer, block_size, data_args.max_validation_blocks)
    return Data(corpus.name, tokenizer, train_blocks, validation), config


def train(trainer: Trainer, checkpoint: str | None, invocation: dict[str, Any]) -> None:
    """Train; a run that diverges leaves a metrics.json that says so, and ends the process."""
    if trainer.is_world_process_zero():
        parameters = count_parameters(trainer.model)
        print(f"{parameters:,} parameters, vocabulary of {len(trainer.processing_class):,}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if DIVERGED not in str(error):
            raise
        if trainer.is_world_process_zero():
            folder, reason = Path(trainer.args.output_dir), str(error)
            step = re.search(r"the first of them step (\d+)", reason)
            outcome = {"eval_loss": None, "diverged": True, "diverged_at": step and int(step[1])}
            write_metrics(folder / "history.json", trainer.state.log_history)
            write_metrics(folder / "metrics.json", {**outcome, "reason": reason, **invocation})
        stop(f"diverged: {error}", EXIT_DIVERGED)


def save_model(trainer: Trainer) -> None:
    """Write the model and the tokenizer as from_pretrained wants them, on any engine."""
    if trainer.is_fsdp_enabled:  # its checkpoints are shards, which from_pretrained cannot load
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def write_results(trainer: Trainer, data: Data, final: dict[str, float], facts: dict[str, Any]) -> None:
    """Write metrics.json, history.json and curves.png, and print a sample and the final loss."""
    args, folder, history = trainer.args, Path(trainer.args.output_dir), trainer.state.log_history
    metrics = collect_metrics(trainer, final["final_loss"], data)
    if metrics["diverged"]:
        metrics["diverged_at"] = first_bad_step(history)
    write_metrics(folder / "history.json", history)
    write_metrics(folder / "metrics.json", {**metrics, **facts})
    plot_curves(folder / "curves.png", history)
    if args.sample_tokens > 0 and not metrics["diverged"]:
        unset_hf_deepspeed_config()  # ZeRO-3 would partition the model loaded here, and wait for other ranks
        prompt = args.prompt or data.tokenizer.decode(data.validation.dataset[0]["input_ids"][:8])
        print(f"\nSample, from {prompt!r} on:\n{sample(folder, prompt, args)}\n")
    print(f"Validation loss {final['final_loss']:.4f}, perplexity {final['final_perplexity']:.2f}: {folder}")


def first_bad_step(history: list[dict[str, Any]]) -> int | None:
    """Return the first step at which a NaN or infinite loss was logged, None if there is none."""
    rows = (row for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0))))
    return next((row["step"] for row in rows), None)


def check_optimizer(args: RecipeArguments, model: PreTrainedModel) -> None:
    """Build the optimizer and throw it away: a wrong option should stop the run before a file is written.

    Raises:
        InputError: an option is unknown or out of range, or the method finds nothing to train in the model.
    """
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if "params" in options:  # one of ours; it allocates no state before its first step
            optimizer_class(**options)
    except ValueError as error:
        raise InputError(f"--optim {args.optim.value}: {error}") from error


def stop(message: str, code: int) -> None:
    """End the process with a message in place of a traceback."""
    print(f"pretrain.py: {message}", file=sys.stderr)
    raise SystemExit(code)


class PretrainingTrainer(Trainer):
    """The Trainer with the paper's schedule."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make warmup_stable_decay constant, then linear down to a tenth, unless its options differ."""
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            decay = round(self.args.decay_fraction * num_training_steps)
            decay = min(decay, num_training_steps - self.args.get_warmup_steps(num_training_steps))
            paper = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": 0.1}
            self.args.lr_scheduler_kwargs = {**paper, **(self.args.lr_scheduler_kwargs or {})}
        return super().create_scheduler(num_training_steps, optimizer)


if __name__ == "__main__":
    main()
