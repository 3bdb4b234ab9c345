"""What each of two ranks does: trains with every method on one engine, and leaves what it saw in a file.

Usage: torchrun --nproc_per_node=2 engine_worker.py ENGINE FOLDER
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engines import gather_parameters, make_arguments
from model import ACCUMULATION, BATCH, CLIP, METHODS, STEPS, learning_rate, make_model, options_of, rows
from transformers import Trainer, TrainerCallback

from hf_noneuclid import norms
from hf_noneuclid.layouts.ownership import polar_flops
from hf_noneuclid.trainer import find_optimizer


class Witness(TrainerCallback):
    """Notes what the optimizer says after each step, and what it has sent."""

    def __init__(self):
        self.said, self.sent = [], []

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        ours = find_optimizer(optimizer)
        self.said.append(ours.diagnostics())
        self.sent.append(dict(ours._plan.ranks.sent))


class Flops:
    """Counts the operations of the polar factors that this rank computes."""

    def __init__(self):
        self.count, self._polar_factor = 0, norms.polar_factor

    def __enter__(self):
        norms.polar_factor = self
        return self

    def __exit__(self, *error):
        norms.polar_factor = self._polar_factor

    def __call__(self, m, *, steps, **options):
        self.count += m.shape[0] * polar_flops(*m.shape[1:], steps)
        return self._polar_factor(m, steps=steps, **options)


def train(engine, folder, method, callbacks=(), resume=None, **options):
    """Trains, and says what was seen."""
    defaults = {
        "output_dir": str(folder / "run"),
        "optim": method,
        "optim_args": ",".join(f"{key}={value}" for key, value in options_of(method).items()),
        "max_steps": STEPS,
        "learning_rate": learning_rate(method),
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = make_arguments(engine, **{**defaults, **options})
    witness = Witness()
    trainer = Trainer(make_model(), args, train_dataset=rows(), callbacks=[witness, *callbacks])
    with Flops() as flops:
        trainer.train(resume_from_checkpoint=resume)
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "parameters": gather_parameters(engine, trainer),
        "step_sizes": [said["step_size"] for said in witness.said],
        "losses": [said["loss"] for said in witness.said],
        "dual_norms": [said["dual_norm"] for said in witness.said],
        "bad_steps": [said["bad_steps"] for said in witness.said],
        "sent": witness.sent,
        "polar_flops": flops.count,
    }


def main(engine, folder):
    seen = {method: train(engine, folder, method) for method in METHODS}
    seen["ranks"] = dist.get_world_size()
    torch.save(seen, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # two-rank CPU workers sometimes abort while the interpreter shuts down
