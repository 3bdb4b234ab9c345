"""How the Trainer runs on each engine with two CPU processes."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from network import flat
from transformers import TrainingArguments

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def make_arguments(engine, **options):
    """TrainingArguments under which a Trainer uses the engine."""
    AcceleratorState._reset_state()
    if engine.startswith("zero"):
        stage, _, offload = engine.removeprefix("zero").partition("_")
        config = deepspeed_config(int(stage), bool(offload), options.get("bf16", False))
        return TrainingArguments(use_cpu=True, deepspeed=config, **options)
    if engine == "fsdp2":
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}
    args = TrainingArguments(use_cpu=True, **options)
    if engine == "fsdp2":
        _ = args.device
        # accelerate runs FSDP on accelerators only, unless it takes the processes for theirs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def deepspeed_config(stage, offload, bf16):
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def gather_parameters(engine, trainer):
    """All parameters, whole, by name."""
    if engine.startswith("zero3"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return flat(trainer.model.named_parameters())
    if engine == "fsdp2":
        return flat((name, p.full_tensor()) for name, p in trainer.model.named_parameters())
    return flat(trainer.model.named_parameters())
