"""Runs a recipe on the CPU, with the engine that `accelerate launch` chose, and records what trained.

Usage: accelerate launch ... on_cpu.py FOLDER RECIPE [OPTIONS OF THE RECIPE]
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer


class Witnessed:
    """Wraps methods of the Trainer, so that it runs on a CPU and records what trained."""

    make_accelerator, train = Trainer.create_accelerator_and_postprocess, Trainer.train

    def __init__(self, folder):
        self.folder = folder

    def install(self):
        Trainer.create_accelerator_and_postprocess = lambda trainer: self.on_cpu(trainer)
        Trainer.train = lambda trainer, *args, **options: self.note(trainer, *args, **options)

    def on_cpu(self, trainer):
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # accelerate runs FSDP only on accelerators, so it is told that these processes have some.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        Witnessed.make_accelerator(trainer)

    def note(self, trainer, *args, **options):
        output = Witnessed.train(trainer, *args, **options)
        path = self.folder / f"rank{dist.get_rank()}.json"
        path.write_text(json.dumps(seen(trainer)), encoding="utf-8")
        return output


def seen(trainer):
    """What trained, and where the parameters are."""
    state, optimizer = AcceleratorState(), trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    weight = trainer.model.get_input_embeddings().weight
    mesh = getattr(weight, "device_mesh", None)
    return {
        "engine": state.distributed_type.value,
        "ranks": dist.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "optimizer": type(optimizer).__name__,
        "mixed_precision": state.mixed_precision,
        "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names or ("all",), mesh.shape, strict=True)),
        "zero": None if state.deepspeed_plugin is None else zero(trainer.model_wrapped),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_sizes": [entry["step_size"] for entry in trainer.state.log_history if "step_size" in entry],
    }


def zero(engine):
    """What DeepSpeed reports about its own optimizer."""
    return {
        "stage": engine.zero_optimization_stage(),
        "state_on": offload.device if (offload := engine.zero_offload_optimizer()) else "none",
    }


if __name__ == "__main__":
    folder, recipe, *options = sys.argv[1:]
    Witnessed(Path(folder)).install()
    sys.argv = [recipe, *options]
    sys.path.insert(0, str(Path(recipe).parent))  # as python does for a script
    runpy.run_path(recipe, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # two-rank CPU workers sometimes abort while the interpreter shuts down
