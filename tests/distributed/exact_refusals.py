"""What must be refused at the first step, on every rank."""

import re
from functools import partial

import torch
from exact_cases import Case
from exact_engines import Replicated, Zero, Zero2, Zero3, rank, world
from exact_run import run
from torch import nn


def refusal(make_engine, case):
    """The error of the first step. Every rank must get one, since a rank that waits for another hangs."""
    try:
        seen = run(make_engine, case)
    except RuntimeError as error:
        return str(error)
    return f"no refusal, but {seen['diagnostics']}"


class Unaveraged(Replicated):
    """Averaging these gradients would fail before the optimizer steps, so they are zeros."""

    def backward(self, grads, is_bad):
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)


class FrozenOnOne(Unaveraged):
    def shard(self, model):
        model.norm.requires_grad_(rank() == 0)
        return model


class WithoutDdp(Unaveraged):
    """Every rank starts with other values."""

    def shard(self, model):
        with torch.no_grad():
            model.norm.weight += rank()
        return model


class OtherSharding(Unaveraged):
    """Parameters as DTensors, without the hooks of FSDP2."""

    names = ("shards",)
    dim = 0
    left_out = None

    def shard(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (world(),), mesh_dim_names=self.names)
        for leaf in model.children():
            for name, p in list(leaf.named_parameters(recurse=False)):
                if leaf is not getattr(model, self.left_out or "", None):
                    sharded = distribute_tensor(p.detach(), mesh, [Shard(min(self.dim, p.ndim - 1))])
                    setattr(leaf, name, nn.Parameter(sharded))
        return model


class ByColumns(OtherSharding):
    dim = 1


class TensorParallel(OtherSharding):
    names = ("tp",)


class NormLeftOut(OtherSharding):
    left_out = "norm"


class Groups1(Zero):
    merged = False


class Groups2(Zero2):
    merged = False


class Groups3(Zero3):
    merged = False


def run_refusals():
    one = Case("muonmax_momo", model="one")
    engines = (FrozenOnOne, WithoutDdp, ByColumns, TensorParallel, NormLeftOut, Groups1, Groups2, Groups3)
    seen = {engine.__name__: refusal(engine, one) for engine in engines}
    seen["OtherModel"] = refusal(Unaveraged, one if rank() == 0 else Case("muonmax_momo"))
    case = Case("muonmax_momo")
    seen["SubGroups"] = message = refusal(partial(Zero3, sub_group_size=300), case)
    needed = int(re.search(r'set "sub_group_size" to (\d+)', message)[1])
    seen["as_told"] = run(partial(Zero3, sub_group_size=needed), case)
    return seen
