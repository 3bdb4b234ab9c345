"""Fine-tune a pretrained language model with non-Euclidean gradient descent.

    python recipes/finetune.py
    python recipes/finetune.py --task causal_lm --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name tatsu-lab/alpaca --prompt_column instruction --response_column output --lora_rank 8
    python recipes/finetune.py --task classification --train_files reviews.csv --label_column stars

With no arguments the model of pretrain.py, made if it is not there, goes on to the docstrings of the
installed torch and transformers, and then learns to tell which of the two an unseen docstring comes from.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import HubStrategy

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.finetuning.before_after import (
    AFTER,
    BEFORE,
    EvaluateFirst,
    evaluate,
    recall,
    table,
)
from hf_noneuclid.experiments.finetuning.default_run import run_default
from hf_noneuclid.experiments.finetuning.finetune_options import (
    ARGUMENT_TYPES,
    FinetuneArguments,
    FinetuneDataArguments,
    FinetuneModelArguments,
)
from hf_noneuclid.experiments.finetuning.isolation import check_causality, check_isolation
from hf_noneuclid.experiments.finetuning.presets import apply_presets, presets_of
from hf_noneuclid.experiments.finetuning.pretrained import add_adapters, load_model, load_tokenizer, merge
from hf_noneuclid.experiments.finetuning.tasks import Task, prepare
from hf_noneuclid.experiments.publishing.checks import check_hub
from hf_noneuclid.experiments.publishing.model import push
from hf_noneuclid.experiments.training.packing import spread
from hf_noneuclid.experiments.training.results import (
    count_parameters,
    describe_corpus,
    describe_run,
    plot_curves,
    sample,
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
    start("finetune.py", argv, ARGUMENT_TYPES, run)


def run(
    model_args: FinetuneModelArguments,
    data_args: FinetuneDataArguments,
    args: FinetuneArguments,
    invocation: dict[str, Any],
) -> None:
    """Prepare data and model, train, evaluate before and after, and write the results.

    Args:
        model_args: which model, and which of its weights are trained.
        data_args: which task and data.
        args: how to train.
        invocation: how the recipe was called, for metrics.json.
    """
    if data_args.task is None:
        run_default(invocation["command"], model_args, args)
        return
    apply_presets(presets_of(data_args.task, model_args), args)
    # Not later: the output folder may have the name of a model on the Hub.
    base_model = model_args.base
    checkpoint = find_checkpoint(args)
    check_adapter(model_args, args)
    check_hub(args)
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the data"):
        tokenizer = load_tokenizer(model_args, data_args.task == "classification")
        task = prepare(data_args, tokenizer)
    model, new = load_model(model_args, tokenizer, data_args.block_size, task.names)
    if task.names is None:
        check_causality(model)
        check_isolation(model, task.data)
    if model_args.lora_rank:
        model = add_adapters(model, model_args, task.names is not None, new)
    check_optimizer(args, model)
    show_log()  # not before: the check above routes the parameters, too
    trainer = make_trainer(model, task, data_args, args)

    began = time.perf_counter()
    train(trainer, checkpoint, invocation)
    after = evaluate(trainer, task, AFTER)
    seconds = round(time.perf_counter() - began, 1)
    save_model(trainer)
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # ZeRO-3 would partition a model loaded here, and wait for other ranks
        if model_args.merges:
            base, _ = load_model(model_args, tokenizer, data_args.block_size, task.names)
            merge(Path(args.output_dir), base)
        options = {**vars(model_args), **vars(data_args), **args.changed()}
        facts = {"seconds": seconds, "resumed_from": checkpoint, "base_model": base_model, **invocation}
        write_results(trainer, task, after, {**facts, "options": options})
    trainer.accelerator.wait_for_everyone()
    push(Path(args.output_dir), args)


def check_adapter(model_args: FinetuneModelArguments, args: FinetuneArguments) -> None:
    """See that no adapter is pushed that others cannot put on its model.

    If they are merged at the end, their checkpoints are not pushed: `args.hub_strategy` becomes `end`.

    Raises:
        InputError: one would be.
    """
    base = model_args.base
    if not (args.push_to_hub and model_args.lora_rank) or (base["on_hub"] and not base["gguf_file"]):
        return
    if not model_args.merges:
        raise InputError(
            f"--lora_rank {model_args.lora_rank}: nobody else could load the adapter, since its model, "
            f"{base['name']}, is not on the Hub: push the whole model with --lora_merge true"
        )
    args.hub_strategy = HubStrategy.END


def make_trainer(
    model: PreTrainedModel, task: Task, data_args: FinetuneDataArguments, args: FinetuneArguments
) -> Trainer:
    """Return the Trainer, which evaluates before it trains; an old run is deleted if so asked."""
    args.label_names = ["labels"]  # which the Trainer does not find out for a model with adapters
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=task.data.train.dataset,
        eval_dataset=spread(task.data.validation.dataset, data_args.eval_blocks),
        processing_class=task.data.tokenizer,
        data_collator=task.collator,
        preprocess_logits_for_metrics=task.reduce,
        compute_metrics=task.summarise,
    )
    trainer.add_callback(EvaluateFirst(lambda: evaluate(trainer, task, BEFORE)))
    if trainer.is_world_process_zero() and args.overwrite_output_dir:
        delete_run(Path(args.output_dir))
    trainer.accelerator.wait_for_everyone()
    return trainer


def write_results(trainer: Trainer, task: Task, after: dict[str, float], facts: dict[str, Any]) -> None:
    """Write metrics.json, history.json and curves.png, and print a sample and the metrics."""
    args, folder, history = trainer.args, Path(trainer.args.output_dir), trainer.state.log_history
    before, metrics = recall(history, BEFORE), describe_run(trainer, after["loss"])
    if metrics["diverged"]:
        metrics["diverged_at"] = first_bad_step(history)
    more = {
        **{name: value for name, value in after.items() if name != "loss"},
        "before": before,
        "after": after,
        "tokens": trainer.state.num_input_tokens_seen,
        "trained_parameters": count_parameters(trainer.model, trained_only=True),
        "corpus": describe_corpus(task.data),
        **({"classes": task.names} if task.names else {}),
    }
    write_metrics(folder / "history.json", history)
    plot_curves(folder / "curves.png", history)
    write_metrics(folder / "metrics.json", {**metrics, **more, **facts})  # last: the run has finished
    if task.prompt is not None and args.sample_tokens > 0 and not metrics["diverged"]:
        prompt = args.prompt or task.prompt
        print(f"\nSample, from {prompt!r} on:\n{sample(folder, prompt, args)}\n")
    print(f"{table(before, after)}\n{folder}")


if __name__ == "__main__":
    main()
