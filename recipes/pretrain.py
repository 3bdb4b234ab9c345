"""Pre-train a language model with non-Euclidean gradient descent.

    python recipes/pretrain.py
    accelerate launch recipes/pretrain.py --config recipes/configs/fineweb_124m.yaml --seed 1

With no arguments a small GPT-2 trains on the embedded corpus with MuonMax-Momo, for a few minutes on two CPU
cores.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.publishing.checks import check_hub
from hf_noneuclid.experiments.publishing.model import push
from hf_noneuclid.experiments.training import causal, masked
from hf_noneuclid.experiments.training.checkpoints import find_checkpoint
from hf_noneuclid.experiments.training.data import load_corpus
from hf_noneuclid.experiments.training.model import load_config, load_model, load_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, describe_call, parse
from hf_noneuclid.experiments.training.packing import collate, pack, pack_lazily, spread
from hf_noneuclid.experiments.training.results import show_sample, write_results
from hf_noneuclid.experiments.training.running import RecipeTrainer, check_optimizer, exit_codes
from hf_noneuclid.log import show_log  # the package makes its methods values of --optim


@exit_codes("pretrain.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the recipe; ``argv`` is by default the command line of the process."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse(argv, ARGUMENT_TYPES["pretrain"])
    if data_args.streaming and args.max_steps < 1:
        raise InputError("a stream has no known length: --streaming needs --max_steps")
    is_causal, sums = model_args.task == "causal_lm", args.loss_reduction == "sum"
    if sums and not is_causal:
        raise InputError("--loss_reduction sum is for --task causal_lm")

    # What is written later must not change what these names mean.
    base_model = model_args.base
    checkpoint = find_checkpoint(args)
    check_hub(args)
    set_seed(args.seed)

    # Text, tokenizer, and blocks of tokens; one process prepares what the others then find in the cache.
    block_size = data_args.block_size
    with args.main_process_first(desc="preparing the data"):
        corpus = load_corpus(data_args, args.data_seed)
        tokenizer = load_tokenizer(model_args, corpus.train, block_size)
        config = load_config(model_args, tokenizer, block_size)
        data = replace(
            corpus,
            train=pack_lazily(corpus.train, tokenizer, block_size),
            validation=pack(corpus.validation, tokenizer, block_size, data_args.max_validation_blocks),
        )

    # The model, and whether the optimizer suits it.
    model = load_model(model_args, config)
    check_optimizer(args, model)
    show_log()  # not earlier: the check above routes the parameters, too

    # Training, and a last evaluation on all of the validation part.
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=data.train.dataset,
        eval_dataset=spread(data.validation.dataset, data_args.eval_blocks),
        processing_class=tokenizer,
        data_collator=collate if is_causal else masked.MaskingCollator(tokenizer),
        compute_loss_func=causal.summed_loss if sums else None,
        preprocess_logits_for_metrics=(causal if is_causal else masked).summed_losses,
        compute_metrics=causal.summarise,
        facts={**describe_call("pretrain.py", argv), "resumed_from": checkpoint, "base_model": base_model},
    )
    began = time.perf_counter()
    trainer.train(checkpoint)
    final = trainer.evaluate(data.validation.dataset, metric_key_prefix="final")
    seconds = round(time.perf_counter() - began, 1)
    trainer.save_model()

    # Results, a sample of text, and the Hub.
    folder, loss = Path(args.output_dir), final["final_loss"]
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # ZeRO-3 would partition the model loaded for the sample
        bits = loss / math.log(2) * data.validation.tokens / data.validation.utf8_bytes
        results = {
            "seconds": seconds,
            "options": {**vars(model_args), **vars(data_args), **args.changed()},
            "perplexity": final["final_perplexity"],
            "bits_per_byte": bits if is_causal else None,
            "tokens": trainer.state.global_step * args.sequences_per_step * block_size,
        }
        write_results(trainer, data, loss, results)
        if is_causal:
            show_sample(folder, tokenizer.decode(data.validation.dataset[0]["input_ids"][:8]), args, loss)
        print(f"Validation loss {loss:.4f}, perplexity {final['final_perplexity']:.2f}: {folder}")
    trainer.accelerator.wait_for_everyone()
    push(folder, args)


if __name__ == "__main__":
    main()
