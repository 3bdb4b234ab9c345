"""The command of a run: its flags, its processes, and the devices that they use."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_noneuclid.experiments.common import InputError, recipes_folder
from hf_noneuclid.experiments.sweeping.suite import Run, Suite, as_text
from hf_noneuclid.experiments.sweeping.suite_file import PEERS


@dataclass(frozen=True)
class Launch:
    """How the processes of a run are started.

    Attributes:
        processes: Processes of a run on this host.
        accelerate_config: File for ``accelerate launch``, or None.
        threads: OMP_NUM_THREADS of a process.
        gpus: The GPUs that the runs share; empty on a CPU.
    """

    processes: int = 1
    accelerate_config: str | None = None
    threads: int = 1
    gpus: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """The number of runs that fit on this host at a time."""
        if self.gpus:
            return max(1, len(self.gpus) // self.processes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // (self.threads * self.processes))

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of a run; different slots use different GPUs while there are enough."""
        values = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            count = len(self.gpus)
            used = range(slot * self.processes, slot * self.processes + min(self.processes, count))
            values["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[i % count] for i in used)
        return values


def choose_launch(suite: Suite, processes: int | None, config: str | None) -> Launch:
    """How runs are started: as the suite says, unless the command line gives processes or a configuration.

    Raises:
        InputError: The accelerate configuration cannot be read.
    """
    config = config or suite.launch["accelerate_config"]
    processes = processes or suite.launch["processes"]
    if config is not None:
        beside = recipes_folder().parent / config
        config = str(beside) if beside.exists() and not Path(config).exists() else config
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
            processes = processes or int(content["num_processes"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise InputError(f"accelerate configuration {config}: {type(error).__name__}: {error}") from error
    if processes in (None, 1):  # accelerate refuses to launch a single process as a distributed run
        processes, config = 1, None
    gpus = () if suite.options.get("use_cpu") else visible_gpus()
    return Launch(processes, config, suite.launch["threads"], gpus)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # takes seconds, and runs on a CPU do not need it

    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(chosen.split(",")[:count]) if chosen else tuple(str(i) for i in range(count))


def recipe_flags(suite: Suite, run: Run, processes: int) -> dict[str, Any]:
    """The flags of the recipe for a run.

    Raises:
        InputError: The global batch cannot be split evenly over so many processes.
    """
    own = {**suite.per_method.get(run.method, {}), **suite.block_of(run).get("flags", {}), **run.options}
    flags = {"disable_tqdm": True, **suite.options, **own}
    pairs = [str(flags.pop("optim_args"))] if flags.get("optim_args") else []
    pairs += [f"{name}={as_text(value)}" for name, value in run.method_options.items()]
    if flags.get("global_batch_size") is not None:
        # A number in the suite stays. The recipe refuses one that does not give the global batch.
        flags.setdefault("gradient_accumulation_steps", accumulation(flags, processes))
    method = {"peer" if run.method in PEERS else "optim": run.method}
    chosen = {**method, "learning_rate": run.learning_rate, "seed": run.seed}
    return {**chosen, **({"optim_args": ",".join(pairs)} if pairs else {}), **flags}


def accumulation(flags: Mapping[str, Any], processes: int) -> int:
    """The batches of a step that make the global batch the same on any number of devices.

    Raises:
        InputError: There is no such number.
    """
    total, batch = int(flags["global_batch_size"]), int(flags.get("per_device_train_batch_size", 8))
    steps, rest = divmod(total, batch * processes)
    if rest or steps == 0:
        raise InputError(
            f"global_batch_size {total} is not a multiple of {batch} (per_device_train_batch_size) "
            f"x {processes} (processes): choose another --processes, or "
            "--option per_device_train_batch_size=..."
        )
    return steps


def command_of(recipe: str, launch: Launch, flags: Mapping[str, Any]) -> list[str]:
    """The command that starts a recipe with these flags, in one process or several."""
    command = [sys.executable]
    if launch.processes > 1:
        command += ["-m", "accelerate.commands.launch", f"--num_processes={launch.processes}"]
        if launch.accelerate_config:
            command += [f"--config_file={launch.accelerate_config}"]
        else:  # "multi_gpu" is accelerate's word for torchrun, which starts processes on CPUs as well
            command += ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        command += ["--main_process_port=0"]
    return [*command, str(recipes_folder() / f"{recipe}.py"), *as_arguments(flags)]


def as_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags as command-line arguments; None leaves the recipe's default."""
    arguments: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(as_text, value)]
        elif value is not None:
            arguments += [f"--{name}={as_text(value)}"]
    return arguments
