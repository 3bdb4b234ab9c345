"""Pre-train a causal language model with non-Euclidean gradient descent.

    python recipes/pretrain.py
    accelerate launch recipes/pretrain.py --config recipes/configs/fineweb_124m.yaml --learning_rate 3e-3

With no arguments a small GPT-2 trains on the embedded corpus with MuonMax-Momo; two CPU cores need a few
minutes.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_noneuclid.experiments.publishing.checks import check_hub
from hf_noneuclid.experiments.publishing.model import push
from hf_noneuclid.experiments.training.base_model import describe_base
from hf_noneuclid.experiments.training.corpus import load_corpus
from hf_noneuclid.experiments.training.model import load_config, load_model, load_tokenizer
from hf_noneuclid.experiments.training.options import (
    ARGUMENT_TYPES,
    DataArguments,
    InputError,
    ModelArguments,
    RecipeArguments,
)
from hf_noneuclid.experiments.training.packing import Data, collate, pack, pack_lazily, spread
from hf_noneuclid.experiments.training.results import (
    block_losses,
    collect_metrics,
    plot_curves,
    sample,
    summarise,
    write_metrics,
)
from hf_noneuclid.experiments.training.run_folder import delete_run, find_checkpoint
from hf_noneuclid.experiments.training.running import (
    RecipeTrainer,
    check_optimizer,
    first_bad_step,
    save_model,
    start,
    train,
)
from hf_noneuclid.log import show_log  # the package makes its methods values of --optim


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe; `argv` is by default the command line of the process."""
    start("pretrain.py", argv, ARGUMENT_TYPES, run)


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
    # Not later: the output folder may have the name of a model on the Hub.
    base_model = describe_base(model_args.model_name_or_path)
    checkpoint = find_checkpoint(args)
    check_hub(args)
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the data"):
        data, config = prepare(model_args, data_args, args)
    model = load_model(model_args, config)
    check_optimizer(args, model)
    show_log()  # not before: the check above routes the parameters, too

    trainer = RecipeTrainer(
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

    began = time.perf_counter()
    train(trainer, checkpoint, invocation)
    final = trainer.evaluate(data.validation.dataset, metric_key_prefix="final")
    seconds = round(time.perf_counter() - began, 1)
    save_model(trainer)
    if trainer.is_world_process_zero():
        options = {**vars(model_args), **vars(data_args), **args.changed()}
        facts = {"seconds": seconds, "resumed_from": checkpoint, "base_model": base_model, **invocation}
        write_results(trainer, data, final, {**facts, "options": options})
    trainer.accelerator.wait_for_everyone()
    push(Path(args.output_dir), args)


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
    return Data(corpus.name, tokenizer, train_blocks, validation, corpus.license), config


def write_results(trainer: Trainer, data: Data, final: dict[str, float], facts: dict[str, Any]) -> None:
    """Write metrics.json, history.json and curves.png, and print a sample and the final loss."""
    args, folder, history = trainer.args, Path(trainer.args.output_dir), trainer.state.log_history
    metrics = collect_metrics(trainer, final["final_loss"], data)
    if metrics["diverged"]:
        metrics["diverged_at"] = first_bad_step(history)
    write_metrics(folder / "history.json", history)
    plot_curves(folder / "curves.png", history)
    write_metrics(folder / "metrics.json", {**metrics, **facts})  # last: it says that the run has finished
    if args.sample_tokens > 0 and not metrics["diverged"]:
        unset_hf_deepspeed_config()  # ZeRO-3 would partition the model loaded here, and wait for other ranks
        prompt = args.prompt or data.tokenizer.decode(data.validation.dataset[0]["input_ids"][:8])
        print(f"\nSample, from {prompt!r} on:\n{sample(folder, prompt, args)}\n")
    print(f"Validation loss {final['final_loss']:.4f}, perplexity {final['final_perplexity']:.2f}: {folder}")


if __name__ == "__main__":
    main()
