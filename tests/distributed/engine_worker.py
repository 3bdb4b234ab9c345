"""What each rank does: it trains on one engine, and writes what it saw to a file.

Usage: torchrun --nproc_per_node=N engine_worker.py MODE ENGINE FOLDER, with MODE one of

run     all methods, a checkpoint half-way; small and large losses; then one more run, which is killed
alone   on one rank: goes on from the checkpoints of two, and makes one of its own
resume  on two: goes on from their own checkpoints, and from that of one rank
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from counting import Flops
from engines import gather_parameters, make_arguments
from network import (
    ACCUMULATION,
    BATCH,
    CLIP,
    LOWER_BOUND,
    METHODS,
    RANKS,
    SLOPE,
    STEPS,
    learning_rate,
    make_model,
    options_of,
    rows,
)
from transformers import Trainer, TrainerCallback

from hf_noneuclid.trainer import NonEuclidTrainerMixin, find_optimizer

SAVED = STEPS // 2
MOMO = [method for method in METHODS if method.endswith("momo")]
NOTED = ("step_size", "loss", "dual_norm", "truncated")
CLIPPED = {"step_size": "momo", "loss_lower_bound": 0.0, "clip": 0.05}  # in every step
STALE = {"nuclear_norm": "stale"}


class Witness(TrainerCallback):
    """Records the optimizer's diagnostics after each step."""

    def __init__(self):
        self.diagnostics = []

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.diagnostics.append(find_optimizer(optimizer).diagnostics())


class Scaled(Trainer):
    """Its loss, above the lower bound, is multiplied by a number."""

    scale = 1.0

    def compute_loss(self, *args, **kwargs):
        return self.scale * (super().compute_loss(*args, **kwargs) - LOWER_BOUND)


class Huge(NonEuclidTrainerMixin, Scaled):
    """It observes its own accelerator alone."""

    scale = 1000.0


class Killed(TrainerCallback):
    """Kills this process after a step that is in no checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 2:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    engine,
    folder,
    method,
    *,
    trainer_class=Trainer,
    clip=CLIP,
    callbacks=(),
    resume=None,
    save=False,
    bf16=False,
    **options,
):
    """Trains with options of the method, and returns what was seen."""
    args = make_arguments(
        engine,
        output_dir=str(folder),
        optim=method,
        optim_args=",".join(f"{key}={value}" for key, value in {**options_of(method), **options}.items()),
        max_steps=STEPS,
        learning_rate=learning_rate(method),
        max_grad_norm=clip,
        bf16=bf16,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH * RANKS // int(os.environ["WORLD_SIZE"]),
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
        save_strategy="steps" if save else "no",
        save_steps=SAVED,
        save_total_limit=1,
        resume_from_checkpoint=resume,  # as scripts set it from the command line
        report_to="none",
        disable_tqdm=True,
    )
    witness = Witness()
    trainer = trainer_class(make_model(), args, train_dataset=rows(), callbacks=[witness, *callbacks])
    if save:
        trainer.add_callback(SaveOnce())
    with Flops() as flops:
        trainer.train(resume_from_checkpoint=resume)
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "engine": str(trainer.accelerator.distributed_type),
        "parameters": gather_parameters(engine, trainer),
        "polar_flops": flops.count,
        "bytes_sent": witness.diagnostics[-1]["bytes_sent"],
        "state_dtypes": {
            str(x.dtype) for its in find_optimizer(trainer.optimizer).state.values() for x in its.values()
        },
        **{key: [step[key] for step in witness.diagnostics] for key in NOTED},
    }


class SaveOnce(TrainerCallback):
    """Saves a checkpoint half-way, and no later one."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == SAVED

    def on_train_end(self, args, state, control, **kwargs):
        control.should_save = False


def run(engine, folder):
    seen = {method: train(engine, folder / method, method, save=method in MOMO) for method in METHODS}
    seen["stale"] = train(engine, folder / "stale", "muonmax_momo", save=True, **STALE)
    seen["slope"] = train(engine, folder / "slope", "muonmax_momo", save=True, **SLOPE)
    seen["bf16"] = train(engine, folder / "x", "muonmax_momo", bf16=True)
    for trainer_class in (Scaled, Huge):
        name = trainer_class.__name__
        seen[name] = train(engine, folder / "x", "muon", trainer_class=trainer_class, **CLIPPED)
    if engine.startswith("zero"):
        seen["offload"] = train(f"{engine}_offload", folder / "x", "muonmax_momo")
    leave(seen, folder, "run")
    train(engine, folder / "killed", "muonmax_momo", save=True, callbacks=[Killed()])


def alone(engine, folder):
    seen = {"one": train(engine, folder / "one", "muonmax_momo", save=True, **STALE)}
    try:
        seen["from_two"] = train(
            engine, folder / "x", "muonmax_momo", resume=checkpoint(folder, "stale"), **STALE
        )
    except Exception as error:  # what it says is what is tested
        seen["error"] = f"{type(error).__name__}: {error}"
    leave(seen, folder, "alone")


def resume(engine, folder):
    seen = {m: train(engine, folder / "x", m, resume=checkpoint(folder, m)) for m in MOMO}
    seen["stale"] = train(engine, folder / "x", "muonmax_momo", resume=checkpoint(folder, "stale"), **STALE)
    seen["slope"] = train(engine, folder / "x", "muonmax_momo", resume=checkpoint(folder, "slope"), **SLOPE)
    seen["killed"] = train(engine, folder / "x", "muonmax_momo", resume=checkpoint(folder, "killed"))
    if not engine.startswith("zero"):
        seen["from_one"] = train(
            engine, folder / "x", "muonmax_momo", resume=checkpoint(folder, "one"), **STALE
        )
    leave(seen, folder, "resume")


def checkpoint(folder, run):
    return str(folder / run / f"checkpoint-{SAVED}")


def leave(seen, folder, mode):
    seen["ranks"] = dist.get_world_size() if dist.is_initialized() else 1
    torch.save(seen, folder / f"{mode}{os.environ['RANK']}.pt")
    if seen["ranks"] > 1:
        dist.barrier()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        {"run": run, "alone": alone, "resume": resume}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # CPU workers sometimes abort while the interpreter shuts down
