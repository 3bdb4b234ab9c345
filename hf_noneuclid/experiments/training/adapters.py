"""LoRA adapters: put beside the layers of a model, merged into it, and pushed only where they are of use."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import HubStrategy

from hf_noneuclid.experiments.common import require
from hf_noneuclid.experiments.training.arguments import PretrainedArguments
from hf_noneuclid.experiments.training.options import RecipeArguments

ALL_LINEAR = "all-linear"
HEADS = ("classifier", "score")  # peft's names of what is trained whole in a classifier


def check_adapter(model_args: PretrainedArguments, base: dict[str, Any], args: RecipeArguments) -> None:
    """Refuses to push an adapter whose model is not on the Hub; of a merged one, only the end is pushed."""
    if not (args.push_to_hub and model_args.lora_rank) or (base["on_hub"] and not base["gguf_file"]):
        return
    require(
        model_args.merges,
        f"--lora_rank {model_args.lora_rank}: nobody else could load the adapter, since its model, "
        f"{base['name']}, is not on the Hub: push the whole model with --lora_merge true",
    )
    args.hub_strategy = HubStrategy.END


def add_adapters(
    model: PreTrainedModel, args: PretrainedArguments, classifies: bool, new: list[str]
) -> PeftModel:
    """Freezes the model and puts LoRA adapters beside its layers; the head of a classifier is trained whole.

    So are the ``new`` modules that the checkpoint lacks: nobody else has them, and they are saved whole.
    """
    targets = args.lora_target_modules or [ALL_LINEAR]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    for target in targets:
        is_found = target == ALL_LINEAR or any(f".{name}".endswith(f".{target}") for name in layers)
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        missing = f"--lora_target_modules {target}: the model has no such layer"
        require(is_found, f"{missing}; it has {known}, and {ALL_LINEAR} means all but the head")
    # peft takes the head by itself, and no module twice, such as a part of another.
    new = [name for name in new if not any(part in HEADS for part in name.split("."))]
    new = [name for name in new if not any(name.startswith(f"{other}.") for other in new)]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
        modules_to_save=new or None,
        exclude_modules=new or None,
        revision=args.model_revision,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
    )
    return get_peft_model(model, config)


def merge(folder: Path, base: PreTrainedModel) -> None:
    """Replaces the adapter saved in a folder by the whole model: ``base`` with the adapter merged."""
    PeftModel.from_pretrained(base, str(folder)).merge_and_unload().save_pretrained(folder)
    for path in [*folder.glob("adapter_*"), folder / "README.md"]:  # the latter is peft's, of the adapter
        path.unlink(missing_ok=True)
