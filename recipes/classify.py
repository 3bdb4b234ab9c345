"""Fine-tune a pretrained model to tell classes of texts apart with non-Euclidean gradient descent.

    python recipes/classify.py
    python recipes/classify.py --train_files reviews.csv --text_column review --label_column stars

With no arguments the model of pretrain.py learns to tell whether a docstring is from torch or transformers.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import DataCollatorWithPadding, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_noneuclid.experiments.publishing.checks import check_hub
from hf_noneuclid.experiments.publishing.model import push
from hf_noneuclid.experiments.training import classification
from hf_noneuclid.experiments.training.adapters import add_adapters, check_adapter, merge
from hf_noneuclid.experiments.training.checkpoints import find_checkpoint
from hf_noneuclid.experiments.training.data import load_rows
from hf_noneuclid.experiments.training.model import load_pretrained, load_pretrained_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, describe_call, parse
from hf_noneuclid.experiments.training.packing import spread
from hf_noneuclid.experiments.training.presets import CLASSIFIER, apply_preset
from hf_noneuclid.experiments.training.results import count_parameters, write_results
from hf_noneuclid.experiments.training.running import (
    BeforeAndAfter,
    RecipeTrainer,
    check_optimizer,
    exit_codes,
)
from hf_noneuclid.log import show_log  # the package makes its methods values of --optim


@exit_codes("classify.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the recipe; ``argv`` is by default the command line of the process."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse(argv, ARGUMENT_TYPES["classify"])
    apply_preset(CLASSIFIER, args)

    # What is written later must not change what these names mean.
    base_model = model_args.base
    checkpoint = find_checkpoint(args)
    check_adapter(model_args, base_model, args)
    check_hub(args)
    set_seed(args.seed)

    # Rows, classes, and sequences of tokens; one process prepares what the others then find in the cache.
    with args.main_process_first(desc="preparing the data"):
        tokenizer = load_pretrained_tokenizer(model_args, classifies=True)
        rows = load_rows(data_args)
        names = classification.class_names(rows, data_args.label_column)
        held_out = spread(rows.validation, data_args.max_validation_blocks or len(rows.validation))
        train = classification.encode(rows.train, tokenizer, data_args, names)
        validation = classification.encode(held_out, tokenizer, data_args, names)
        data = replace(rows, train=train, validation=validation)

    # The model with a head for the classes, and whether the optimizer suits it.
    model, new = load_pretrained(model_args, tokenizer, data_args.block_size, names)
    if model_args.lora_rank:
        model = add_adapters(model, model_args, classifies=True, new=new)
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
        data_collator=DataCollatorWithPadding(tokenizer),
        preprocess_logits_for_metrics=classification.keep_logits,
        compute_metrics=classification.summarise,
        facts={**describe_call("classify.py", argv), "resumed_from": checkpoint, "base_model": base_model},
    )
    comparison = BeforeAndAfter(trainer, {"": validation.dataset})
    trainer.add_callback(comparison)
    began = time.perf_counter()
    trainer.train(checkpoint)
    loss = comparison.evaluate()
    seconds = round(time.perf_counter() - began, 1)
    trainer.save_model()

    # Results, and the Hub.
    folder = Path(args.output_dir)
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # ZeRO-3 would partition a model loaded from here on
        if model_args.merges:
            merge(folder, load_pretrained(model_args, tokenizer, data_args.block_size, names)[0])
        results = {
            "seconds": seconds,
            "options": {**vars(model_args), **vars(data_args), **args.changed()},
            **comparison.results(),
            "tokens": trainer.state.num_input_tokens_seen,
            "trained_parameters": count_parameters(trainer.model, trained_only=True),
            "classes": names,
        }
        write_results(trainer, data, loss, results)
        print(f"{comparison.table()}\n{folder}")
    trainer.accelerator.wait_for_everyone()
    push(folder, args)


if __name__ == "__main__":
    main()
