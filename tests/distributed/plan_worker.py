"""Three steps with engines on the processes of torchrun: bytes sent and kept, beside the prediction.

    torchrun --nproc_per_node=2 tests/distributed/plan_worker.py --engine ddp fsdp2 zero1 zero2 zero3
    torchrun --nproc_per_node=4 tests/distributed/plan_worker.py --engine hsdp --gpus_per_node 2

Prints a JSON object for each engine and rank. The engines are used as they are, without the Trainer:
``DistributedDataParallel``, ``fully_shard`` on a mesh of one or two dimensions, and ``deepspeed.initialize``.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig as Config

from hf_noneuclid import NonEuclideanDescent, methods, one_group
from hf_noneuclid.experiments.costs.engines import ENGINES, Grid, grid_of
from hf_noneuclid.experiments.costs.models import build, load_config
from hf_noneuclid.experiments.costs.step import Costs, shapes_of
from hf_noneuclid.options import NUCLEAR_NORMS

STEPS = 3
BATCH = (2, 8)  # rows and tokens of each GPU
LR = 1e-3


def measure(
    config: Config, engines: Sequence[str], optim: str, nuclear_norm: str, gpus_per_node: int
) -> list[dict[str, Any]]:
    """Trains with each engine, and counts. All processes call it together.

    Returns:
        A row for each engine and rank on the first rank, nothing on the others.

    Raises:
        ValueError: An engine does not fit the number of processes, or deepspeed is missing.
    """
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs there
        device = _join()
        mine = []
        for engine in engines:
            grid = grid_of(engine, dist.get_world_size(), gpus_per_node)
            mine.append(_measure_engine(config, engine, grid, optim, nuclear_norm, device))
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)
        is_first = dist.get_rank() == 0
        dist.destroy_process_group()
    return [row for by_engine in zip(*by_rank, strict=True) for row in by_engine] if is_first else []


def _join() -> torch.device:
    """Joins the other processes of torchrun; returns the device of this one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def _measure_engine(
    config: Config, engine: str, grid: Grid, optim: str, nuclear_norm: str, device: torch.device
) -> dict[str, Any]:
    """Bytes of this rank: sent in a step by collective, and kept by the optimizer."""
    rank = dist.get_rank()
    model = build(config, device)
    shapes = shapes_of(model, optim, nuclear_norm=nuclear_norm)
    costs = Costs(shapes, engine, grid, device.type)
    wrapped, optimizer = _wrap(model, engine, grid, optim, nuclear_norm)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(STEPS * rank + step)
        tokens = torch.randint(config.vocab_size, BATCH, generator=generator).to(device)
        _step(wrapped, optimizer, tokens)
    sent = optimizer.diagnostics()["bytes_sent"]
    predicted = _by_collective(costs)
    measured = {name: sent.get(name, 0) / STEPS for name in predicted}
    place = divmod(rank, grid[1])
    return {
        "engine": engine,
        "rank": rank,
        "measured": {**measured, "state": _state_bytes(optimizer)},
        "predicted": {
            name: int(by_rank[place]) for name, by_rank in {**predicted, "state": costs.state_bytes()}.items()
        },
    }


def _by_collective(costs: Costs) -> dict[str, Any]:
    """What each rank sends in a step, as the optimizer's diagnostics count it."""
    sent = costs.sent_bytes()
    return {
        "all_to_all": sent["momentum"] + sent["directions"],
        "all_gather": costs.direction_bytes * costs.gathered,
        "broadcast": costs.broadcast,
        "all_reduce": sent["scalars"],
    }


def _step(model: Any, optimizer: NonEuclideanDescent, tokens: torch.Tensor) -> None:
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.observe_loss(loss)
    if hasattr(model, "backward"):  # DeepSpeed's, which steps the optimizer itself
        model.backward(loss)
        model.step()
        return
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _state_bytes(optimizer: NonEuclideanDescent) -> int:
    """Of this rank's part; what parameters share counts once."""
    tensors = [value for its in optimizer.state.values() for value in its.values()]
    local = {id(x): x.to_local() if hasattr(x, "to_local") else x for x in tensors}
    return sum(x.numel() * x.element_size() for x in local.values())


# ---------------------------------------------------------------- the engines


def _wrap(
    model: nn.Module, engine: str, grid: Grid, optim: str, nuclear_norm: str
) -> tuple[Any, NonEuclideanDescent]:
    """The model as the engine trains it, and its optimizer."""
    is_zero = engine.startswith("zero")
    if engine in ("fsdp2", "hsdp"):
        _shard(model, grid if engine == "hsdp" else grid[1:])
    method, tuning = methods.resolve(optim, nuclear_norm=nuclear_norm)
    groups = methods.create_groups(model, method)  # of the parameters that the model has now
    arguments = methods.optimizer_arguments(method, tuning)
    optimizer = NonEuclideanDescent(one_group(groups) if is_zero else groups, LR, **arguments)
    if is_zero:
        return _deepspeed(model, optimizer, stage=int(engine[-1])), optimizer
    return nn.parallel.DistributedDataParallel(model) if engine == "ddp" else model, optimizer


def _shard(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Shards every layer, and then the rest, over a mesh of that shape."""
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(next(model.parameters()).device.type, shape, mesh_dim_names=names)
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _deepspeed(model: nn.Module, optimizer: NonEuclideanDescent, stage: int) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"--engine zero{stage} needs deepspeed: pip install deepspeed") from error

    count = sum(param.numel() for param in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": BATCH[0],
        "zero_optimization": {"stage": stage, "sub_group_size": max(count, 10**9)},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", required=True)
    parser.add_argument("--gpus_per_node", type=int, default=8, help="the number of shards of hsdp")
    parser.add_argument("--optim", default="muonmax_momo")
    parser.add_argument("--nuclear_norm", choices=NUCLEAR_NORMS, default="exact")
    args = parser.parse_args()
    config = load_config(args.model)
    for row in measure(config, args.engine, args.optim, args.nuclear_norm, args.gpus_per_node):
        print(json.dumps(row))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # CPU workers sometimes abort while the interpreter shuts down


if __name__ == "__main__":
    main()
