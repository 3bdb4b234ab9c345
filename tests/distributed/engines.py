"""How the Trainer runs on each engine with two CPU processes."""

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from model import flat
from transformers import TrainingArguments

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def make_arguments(engine, **options):
    """TrainingArguments under which a Trainer uses the engine."""
    AcceleratorState._reset_state()
    if engine.startswith("zero"):
        return TrainingArguments(use_cpu=True, deepspeed=deepspeed_config(int(engine[-1])), **options)
    if engine == "fsdp2":
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}
    args = TrainingArguments(use_cpu=True, **options)
    if engine == "fsdp2":
        _ = args.device
        # accelerate runs FSDP on accelerators only, unless it takes the processes for theirs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def deepspeed_config(stage, **zero):
    return {
        "zero_optimization": {"stage": stage, **zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def gather_parameters(engine, trainer):
    """All parameters, whole, by name."""
    if engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return flat(trainer.model.named_parameters())
    if engine == "fsdp2":
        return flat((name, p.full_tensor()) for name, p in trainer.model.named_parameters())
    return flat(trainer.model.named_parameters())


def rank():
    return dist.get_rank()
