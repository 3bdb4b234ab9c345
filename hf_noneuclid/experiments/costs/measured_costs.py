"""Three steps with an engine on the processes of torchrun: bytes sent and kept, beside the plan's.

The engines are used as they are, without the Trainer: ``DistributedDataParallel``, ``fully_shard`` on a
mesh of one or two dimensions, and ``deepspeed.initialize``.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from hf_noneuclid import NonEuclideanDescent, methods, one_group
from hf_noneuclid.experiments.costs.layout_costs import Costs, Grid, grid_of, shapes_of

STEPS = 3
BATCH = (2, 8)  # rows and tokens of each GPU
LR = 1e-3
Model = Any
"""What is called with tokens; with ``backward`` and ``step`` of its own if DeepSpeed has made it."""


def main(args: argparse.Namespace, config: PretrainedConfig) -> None:
    """Measure, and print on the first rank what all have seen.

    Raises:
        ValueError: The engine does not fit the number of processes, or deepspeed is missing.
    """
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs there
        device = _join()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        mine = [_measure(args, engine, config, device) for engine in args.engines]
        said: list[Any] = [None] * ranks
        dist.all_gather_object(said, mine)
        dist.destroy_process_group()
    rows = [row for by_engine in zip(*said, strict=True) for row in by_engine]
    if rank == 0:
        print(json.dumps({"ranks": ranks, "rows": rows}) if args.json else _text(args, rows, ranks))
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks > 1:
        os._exit(0)  # CPU workers sometimes abort while the interpreter shuts down


def _join() -> torch.device:
    """Joins the other processes, or makes a group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def _measure(
    args: argparse.Namespace, engine: str, config: PretrainedConfig, device: torch.device
) -> dict[str, Any]:
    """Bytes of this rank: sent in a step by collective, and kept by the optimizer."""
    grid = grid_of(engine, dist.get_world_size(), args.gpus_per_node)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    shapes = shapes_of(model, args.optim, nuclear_norm=args.nuclear_norm)
    costs = Costs(shapes, engine, grid, device.type)
    method, tuning = methods.resolve(args.optim, nuclear_norm=args.nuclear_norm)
    job = Job(model, engine, grid, method, methods.optimizer_arguments(method, tuning))
    wrapped, optimizer = _WRAP[engine](job)
    for step in range(STEPS):
        _step(wrapped, optimizer, config.vocab_size, step, device)
    assert optimizer._plan is not None
    sent = optimizer._plan.ranks.sent
    if any(total % STEPS for total in sent.values()):
        raise RuntimeError(f"the steps did not send the same: {dict(sent)} in {STEPS}")
    return {
        "engine": engine,
        "rank": dist.get_rank(),
        "parameters": shapes.parameters,
        "measured": {key: total // STEPS for key, total in sent.items()} | {"state": _state_bytes(optimizer)},
        "predicted": _predicted(costs, divmod(dist.get_rank(), grid[1])),
    }


def _step(model: Model, optimizer: NonEuclideanDescent, words: int, step: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(STEPS * dist.get_rank() + step)
    tokens = torch.randint(words, BATCH, generator=generator).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.observe_loss(loss)
    if hasattr(model, "backward"):  # DeepSpeed's, which steps the optimizer itself
        model.backward(loss)
        model.step()
        return
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _predicted(costs: Costs, place: Grid) -> dict[str, int]:
    sent = {name: int(by_rank[place]) for name, by_rank in costs.sent_bytes().items()}
    by_collective = {
        "all_to_all": sent["momentum"] + sent["directions"],
        "all_gather": costs.direction_bytes * int(costs.gathered[place]),
        "broadcast": int(costs.broadcast[place]),
        "all_reduce": sent["scalars"],
    }
    return {key: size for key, size in by_collective.items() if size} | {
        "state": int(costs.state_bytes()[place])
    }


def _state_bytes(optimizer: NonEuclideanDescent) -> int:
    """Of this rank's part; what parameters share counts once."""
    tensors = [value for its in optimizer.state.values() for value in its.values()]
    local = {id(x): x.to_local() if hasattr(x, "to_local") else x for x in tensors}
    return sum(x.numel() * x.element_size() for x in local.values())


# ------------------------------------------------------------------------------------- the engines


class Job(NamedTuple):
    """What an engine shall train, and how."""

    model: nn.Module
    engine: str
    grid: Grid
    method: methods.Method
    options: dict[str, Any]
    """Of the optimizer."""

    def make_optimizer(self, *, one: bool = False) -> NonEuclideanDescent:
        """Of the parameters that the model has now, in one group if that is asked for."""
        groups = methods.create_groups(self.model, self.method)
        return NonEuclideanDescent(one_group(groups) if one else groups, LR, **self.options)


def _ddp(job: Job) -> tuple[Model, NonEuclideanDescent]:
    return nn.parallel.DistributedDataParallel(job.model), job.make_optimizer()


def _fully_shard(job: Job) -> tuple[Model, NonEuclideanDescent]:
    from torch.distributed.fsdp import fully_shard

    device = next(job.model.parameters()).device.type
    shape, names = (job.grid, ("replicate", "shard")) if job.engine == "hsdp" else (job.grid[1:], ("shard",))
    mesh = dist.init_device_mesh(device, shape, mesh_dim_names=names)
    for layers in (module for module in job.model.modules() if isinstance(module, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(job.model, mesh=mesh)
    return job.model, job.make_optimizer()


def _zero(job: Job) -> tuple[Model, NonEuclideanDescent]:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"--engine {job.engine} needs deepspeed: pip install deepspeed") from error

    optimizer = job.make_optimizer(one=True)
    elements = sum(param.numel() for param in job.model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": BATCH[0],
        "zero_optimization": {"stage": int(job.engine[-1]), "sub_group_size": max(elements, 10**9)},
        "zero_allow_untested_optimizer": True,
    }
    wrapped, *_ = deepspeed.initialize(model=job.model, optimizer=optimizer, config=config)
    return wrapped, optimizer


_WRAP: dict[str, Callable[[Job], tuple[Model, NonEuclideanDescent]]] = {
    "ddp": _ddp,
    **dict.fromkeys(("fsdp2", "hsdp"), _fully_shard),
    **dict.fromkeys(("zero1", "zero2", "zero3"), _zero),
}


def _text(args: argparse.Namespace, rows: list[dict[str, Any]], ranks: int) -> str:
    """A table with a row for each engine, rank and number."""
    lines = [
        f"{args.model}, {rows[0]['parameters']:,} parameters, {ranks} processes, {args.optim}, nuclear_norm "
        f"{args.nuclear_norm}: bytes sent in one step by collective, and kept by the optimizer",
        "",
        "| engine | rank | bytes | measured | predicted | measured per parameter |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in sorted(row["measured"].keys() | row["predicted"].keys()):
            measured, predicted = (row[kind].get(name, 0) for kind in ("measured", "predicted"))
            cells = [row["engine"], str(row["rank"]), name, f"{measured:,}", f"{predicted:,}"]
            lines.append(f"| {' | '.join(cells)} | {measured / row['parameters']:.4f} |")
    return "\n".join(lines)
