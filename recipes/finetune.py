"""Fine-tune a pretrained language model with non-Euclidean gradient descent.

    python recipes/finetune.py
    python recipes/finetune.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --lora_rank 8 \
        --dataset_name tatsu-lab/alpaca --prompt_column instruction --response_column output

With no arguments the model of pretrain.py, which is made if it is not there, learns the docstrings of the
installed torch and transformers; then classify.py makes it tell which of the two an unseen docstring is from.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_noneuclid.experiments.publishing.checks import check_hub
from hf_noneuclid.experiments.publishing.model import push
from hf_noneuclid.experiments.training import causal
from hf_noneuclid.experiments.training.adapters import add_adapters, check_adapter, merge
from hf_noneuclid.experiments.training.checkpoints import find_checkpoint
from hf_noneuclid.experiments.training.data import load_rows
from hf_noneuclid.experiments.training.default_run import run_default
from hf_noneuclid.experiments.training.isolation import check_causality, check_isolation
from hf_noneuclid.experiments.training.model import load_pretrained, load_pretrained_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, describe_call, parse
from hf_noneuclid.experiments.training.packing import spread
from hf_noneuclid.experiments.training.presets import FULL, LORA, apply_preset
from hf_noneuclid.experiments.training.results import count_parameters, show_sample, write_results
from hf_noneuclid.experiments.training.running import (
    BeforeAndAfter,
    RecipeTrainer,
    check_optimizer,
    exit_codes,
)
from hf_noneuclid.log import show_log  # the package makes its methods values of --optim


@exit_codes("finetune.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the recipe; ``argv`` is by default the command line of the process."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse(argv, ARGUMENT_TYPES["finetune"])
    if data_args.task is None and data_args.embedded:
        return run_default(argv, model_args, args)
    apply_preset(LORA if model_args.lora_rank else FULL, args)

    # What is written later must not change what these names mean.
    base_model = model_args.base
    checkpoint = find_checkpoint(args)
    check_adapter(model_args, base_model, args)
    check_hub(args)
    set_seed(args.seed)

    # Rows, and sequences of tokens; one process prepares what the others then find in the cache.
    with args.main_process_first(desc="preparing the data"):
        tokenizer = load_pretrained_tokenizer(model_args, classifies=False)
        rows = load_rows(data_args)
        train = causal.encode(rows.train, tokenizer, data_args)
        validation = causal.encode(rows.validation, tokenizer, data_args, data_args.max_validation_blocks)
        data = replace(rows, train=train, validation=validation)
        old_domain = causal.encode_old_domain(data_args, tokenizer)

    # The model, and whether it suits the task and the optimizer.
    model, new = load_pretrained(model_args, tokenizer, data_args.block_size)
    check_causality(model)
    check_isolation(model, data)
    if model_args.lora_rank:
        model = add_adapters(model, model_args, classifies=False, new=new)
    check_optimizer(args, model)
    show_log()  # not earlier: the check above routes the parameters, too

    # Training, and an evaluation on all of the validation part before and after.
    args.label_names = ["labels"]  # the Trainer does not find them for a model with adapters
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=train.dataset,
        eval_dataset=spread(validation.dataset, data_args.eval_blocks),
        processing_class=tokenizer,
        data_collator=causal.Collator(tokenizer),
        preprocess_logits_for_metrics=causal.summed_losses,
        compute_metrics=causal.summarise,
        facts={**describe_call("finetune.py", argv), "resumed_from": checkpoint, "base_model": base_model},
    )
    parts = {"": validation.dataset, **({"old_domain_": old_domain.dataset} if old_domain else {})}
    comparison = BeforeAndAfter(trainer, parts)
    trainer.add_callback(comparison)
    began = time.perf_counter()
    trainer.train(checkpoint)
    loss = comparison.evaluate()
    seconds = round(time.perf_counter() - began, 1)
    trainer.save_model()

    # Results, a sample of text, and the Hub.
    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # ZeRO-3 would partition the models loaded from here on
        if model_args.merges:
            merge(folder, load_pretrained(model_args, tokenizer, data_args.block_size)[0])
        results = {
            "seconds": seconds,
            "options": {**vars(model_args), **vars(data_args), **args.changed()},
            **comparison.results(),
            "tokens": trainer.state.num_input_tokens_seen,
            "trained_parameters": count_parameters(trainer.model, trained_only=True),
        }
        write_results(trainer, data, loss, results)
        show_sample(folder, causal.first_prompt(rows, data_args, tokenizer), args, loss)
        print(f"{comparison.table()}\n{folder}")
    trainer.accelerator.wait_for_everyone()
    push(folder, args)


if __name__ == "__main__":
    main()
