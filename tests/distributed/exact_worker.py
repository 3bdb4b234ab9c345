"""What each rank does: takes steps of the bare optimizer on one engine, from given gradients.

Usage: torchrun --nproc_per_node=N exact_worker.py ENGINE FOLDER

The data are there in four shares, of which each of two ranks averages two. All numbers are multiples of a
power of two, so that no average is rounded, and one process, which averages all four, sees the same bits.
"""

import contextlib
import gc
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hf_noneuclid import METHODS, NonEuclideanDescent, create_optimizer, norms, one_group
from hf_noneuclid.layouts.exchange import Exchange
from hf_noneuclid.layouts.ownership import polar_flops
from hf_noneuclid.layouts.ranks import Ranks
from hf_noneuclid.methods import create_groups, optimizer_arguments, resolve

SHARES, STEPS = 4, 7
LOSSES = (8.0, 12.0, 8.0, 20.0, 8.0, 24.0, 28.0)
OFFSETS = (-3.0, -1.5, 0.5, 4.0)  # of the shares' losses; they add up to nothing
LOWER_BOUND = 1.0
# So high that Momo truncates some steps, and that parameters end as what the steps made of them.
LEARNING_RATES = {"muon": 0.05, "scion": 0.05, "polargrad": 2e-3, "muonmax": 6e-4}
FEWER = {"full": 1, "one": 10, "none": 10}  # what the dual norms of the models are divided by, about
TINY, HUGE = 2.0**-83, 2.0**50  # about 1e-25 and 1e+15


class Case(NamedTuple):
    method: str
    nuclear_norm: str = "exact"
    polar_method: str = "svd"
    model: str = "full"
    scale: float = 1.0
    """Of the gradient of one matrix."""
    starts_badly: bool = False
    """The first gradient is NaN, and in the first good step one is missing."""

    @property
    def bad_gradient(self):
        return 0 if self.starts_badly else 2

    @property
    def missing_gradient(self):
        return 1 if self.starts_badly else 5

    @property
    def bad_loss(self):
        return 4


EVERYTHING = [
    Case(method, nuclear, polar)
    for method in METHODS
    for nuclear in ("exact", "stale", "frobenius")
    for polar in ("svd", "polar_express")
]
CASES = [
    *EVERYTHING,
    *(Case(method, "stale", starts_badly=True) for method in METHODS),
    *(
        Case(method, nuclear, scale=x)
        for method in METHODS
        for nuclear in ("exact", "stale")
        for x in (TINY, HUGE)
    ),
    Case("muonmax_momo", "frobenius", scale=TINY),
    Case("muonmax", "frobenius", scale=HUGE),
    *(Case(method, "stale", model=model) for method in METHODS for model in ("one", "none")),
    *(
        Case("muonmax_momo", nuclear, model=model)
        for nuclear in ("exact", "frobenius")
        for model in ("one", "none")
    ),
]
BROKEN = {
    "loss": Case("muonmax_momo"),
    "dual": Case("muonmax_momo"),
    "fragment": Case("muonmax_momo"),
}


# ---------------------------------------------------------------- models, linear in their parameters


class Dotted:
    """Instead of what the module computes: the inner product of its own parameters with given ones."""

    def forward(self, grads):
        return sum((p * grads[name]).sum() for name, p in self.named_parameters(recurse=False))


class Linear(Dotted, nn.Linear): ...


class Norm(Dotted, nn.LayerNorm): ...


class Conv(Dotted, nn.Conv1d): ...


class Experts(Dotted, nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(5, 6, 4))


class Model(nn.Module):
    def forward(self, grads):
        """Leaves out the modules for which there are no gradients."""
        loss = 0.0
        for name, leaf in self.named_children():
            its = {key.removeprefix(f"{name}."): g for key, g in grads.items() if key.startswith(f"{name}.")}
            loss = loss + leaf(its) if its else loss
        return loss


class Full(Model):
    """Uneven rows, one row, one column, a stack, a convolution, a vector of one element, a frozen one."""

    def __init__(self):
        super().__init__()
        self.up = Linear(8, 65)
        self.gate = Linear(8, 1)
        self.narrow = Linear(8, 7)
        self.column = Linear(1, 6, bias=False)
        self.frozen = Linear(8, 8).requires_grad_(False)
        self.norm = Norm(8)
        self.experts = Experts()
        self.conv = Conv(3, 4, 3)
        self.down = Linear(65, 8, bias=False)


class OneMatrix(Model):
    """Fewer matrices than ranks."""

    def __init__(self):
        super().__init__()
        self.narrow = Linear(9, 7)
        self.norm = Norm(5)


class NoneForSome(Model):
    """A matrix so small that only one rank holds anything of it, however parameters are cut."""

    def __init__(self):
        super().__init__()
        self.narrow = Linear(1, 1, bias=False)
        self.norm = Norm(16)


MODELS = {"full": Full, "one": OneMatrix, "none": NoneForSome}
SCALED = "narrow.weight"


def make_model(case):
    """Small parameters, so that they end as what the steps made of them."""
    model, generator = MODELS[case.model](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            # Where a gradient is huge, the parameter is small: else Σ⟨p, g⟩ would drown the loss.
            p /= max(1.0, case.scale) if name == SCALED else 1.0
    return model


def make_optimizer(case, model, merged):
    """Some parameters decay. For DeepSpeed, all are in one group."""
    momo = case.method.endswith("_momo")
    options = {
        "polar_method": case.polar_method,
        "nuclear_norm": case.nuclear_norm,
        "momentum": 0.5,
        "beta2": 0.75,
        "matrix_lr_scale": 2.0,
        **({"loss_lower_bound": LOWER_BOUND} if momo else {}),
    }
    name = case.method.removesuffix("_momo")
    lr = LEARNING_RATES[name] * FEWER[case.model] ** (1 if name in ("muon", "scion") else 2)
    decay = {"weight_decay": 2.0, "decay_parameters": ["up.weight", "experts.down_proj", "norm.weight"]}
    if not merged:
        return create_optimizer(model, case.method, lr=lr, **decay, **options)
    settings, tuning = resolve(case.method, **options)
    scale = tuning.pop("matrix_lr_scale")
    groups = one_group(create_groups(model, settings, matrix_lr_scale=scale, **decay))
    return NonEuclideanDescent(groups, lr, **optimizer_arguments(settings, tuning))


def gradients(case):
    """Of each step: name to gradients, of shape (shares, ...)."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in make_model(case).named_parameters() if p.requires_grad}
    for step in range(STEPS):
        grads = {
            name: torch.randint(-512, 513, (SHARES, *shape), generator=generator) / 256
            for name, shape in shapes.items()
        }
        grads[SCALED] *= case.scale
        if step == case.missing_gradient:
            grads = {name: g for name, g in grads.items() if not name.startswith("narrow.")}
        yield grads


# ---------------------------------------------------------------- engines


class Replicated:
    """What one device does, and what DistributedDataParallel does."""

    merged = False

    def __init__(self, case):
        self.model = self.shard(make_model(case))
        self.optimizer = make_optimizer(case, self.model, self.merged)

    def shard(self, model):
        return model

    def backward(self, grads, is_bad):
        self.optimizer.zero_grad()
        self.model(grads).backward()
        for p in self.model.parameters():
            if p.grad is not None and world() > 1:
                dist.all_reduce(p.grad)
                p.grad /= world()
        if is_bad:
            next(self.model.parameters()).grad.view(-1)[-1] = torch.nan

    def step(self, loss):
        self.optimizer.step(loss=loss)

    def parameters(self):
        """Whole."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def parts(self):
        """What this rank holds of them."""
        return [local(p.detach()).clone() for p in self.model.parameters()]

    def close(self):
        pass


class Fsdp2(Replicated):
    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (world(),))

    def shard(self, model):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=self.mesh())

    def backward(self, grads, is_bad):
        self.optimizer.zero_grad()
        self.model(_poisoned(grads, is_bad)).backward()

    def parameters(self):
        return {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}


class Hsdp(Fsdp2):
    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


class Zero(Replicated):
    stage = 1
    merged = True

    def __init__(self, case, **zero):
        import deepspeed

        gc.freeze()  # DeepSpeed collects garbage for every engine; the modules imported so far are none
        model = make_model(case)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 by default
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, **zero},
        }
        self.optimizer = make_optimizer(case, model, self.merged)
        self.engine = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]
        self.model = self.engine.module

    def backward(self, grads, is_bad):
        self.engine.backward(self.engine(_poisoned(grads, is_bad)))

    def step(self, loss):
        self.optimizer.observe_loss(loss, begin=True)
        self.engine.step()

    def close(self):
        """Else DeepSpeed keeps every engine, and each new one is slower."""
        self.engine.destroy()


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3

    def backward(self, grads, is_bad):
        """Where a parameter goes unused, ZeRO-3 gives any optimizer its gradient of the step before."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        zeros = {name: torch.zeros(p.ds_shape) for name, p in self.model.named_parameters()}
        super().backward({name: grads.get(name, zeros[name]) for name in names}, is_bad)

    def parameters(self):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return super().parameters()

    def parts(self):
        return [p.ds_tensor.clone() for p in self.model.parameters()]


ENGINES = {
    "replicated": Replicated,
    "fsdp2": Fsdp2,
    "hsdp": Hsdp,
    "zero1": Zero,
    "zero2": Zero2,
    "zero3": Zero3,
}


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _poisoned(grads, is_bad):
    """With a NaN as the last entry of the first gradient."""
    name, grad = next(iter(grads.items()))
    last = torch.arange(grad.numel()).view(grad.shape) == grad.numel() - 1
    return {**grads, name: grad.masked_fill(last, torch.nan)} if is_bad else grads


# ---------------------------------------------------------------- what is seen


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


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def snapshot(engine):
    """Everything that a bad step must leave as it is, on this rank."""
    state = engine.optimizer.state.values()
    return [*engine.parts(), *(local(x).clone() for its in state for x in its.values())]


def count_bytes(optimizer):
    """Of the state on this rank, and of the momenta and second moments alone."""
    keys, plan = optimizer.state, optimizer._plan
    held = {id(x): local(x) for its in keys.values() for x in its.values()}
    adaptive = [piece.size for piece in plan.pieces if piece.norm in norms.ADAPTIVE_NORMS]
    return {
        "all": sum(x.nbytes for x in held.values()),
        "momenta": sum(local(its["momentum"]).nbytes for its in keys.values()),
        "float32": 4 * sum(local(p).numel() for p in keys),
        "second_moments": 4 * sum(adaptive),
        "units": sum(piece.units for piece in plan.pieces),
    }


def run(engine_class, case):
    """Takes the steps of a case, and says what was seen."""
    engine = engine_class(case)
    seen = {"said": [], "unchanged": []}
    mine = slice(rank() * SHARES // world(), (rank() + 1) * SHARES // world())
    with Flops() as flops:
        for step, shares in enumerate(gradients(case)):
            before, last = snapshot(engine), rank() == world() - 1
            grads = {name: x[mine].mean(0) for name, x in shares.items()}
            loss = LOSSES[step] + torch.tensor(OFFSETS[mine]).mean().item()
            engine.backward(grads, is_bad=last and step == case.bad_gradient)
            engine.step(torch.nan if last and step == case.bad_loss else loss)
            seen["said"].append(engine.optimizer.diagnostics())
            same = [torch.equal(x, y) for x, y in zip(before, snapshot(engine), strict=False)]
            seen["unchanged"].append(all(same))
    seen |= {"parameters": engine.parameters(), "bytes": count_bytes(engine.optimizer), "flops": flops.count}
    engine.close()
    return seen


# ---------------------------------------------------------------- runs that must not agree


def one_ranks_loss(self, plan, loss, must_move):
    return _check(self, plan, loss, must_move)._replace(loss=plan.scalar(loss))


def one_ranks_dual(self, plan):
    Ranks.sum = lambda self, x: x
    measured = _measure(self, plan)
    Ranks.sum = _sum
    return measured


def first_fragment_only(flat, block, held):
    """What another rank has the beginning of is sent as zeros."""
    fragment = _fragment(flat, block, held)
    return torch.zeros_like(fragment) if block.run[0] < held[0] else fragment


_check, _measure = NonEuclideanDescent._check, NonEuclideanDescent._measure
_sum, _fragment = Ranks.sum, Exchange._fragment
BREAKS = {
    "loss": (NonEuclideanDescent, "_check", one_ranks_loss, _check),
    "dual": (NonEuclideanDescent, "_measure", one_ranks_dual, _measure),
    "fragment": (Exchange, "_fragment", staticmethod(first_fragment_only), staticmethod(_fragment)),
}


def run_broken(engine_class, fault):
    owner, name, broken, whole = BREAKS[fault]
    setattr(owner, name, broken)
    try:
        return run(engine_class, BROKEN[fault])
    finally:
        setattr(owner, name, whole)


# ---------------------------------------------------------------- what must be refused


def refusal(make_engine, case):
    """The message of the first step. Every rank must get one: a rank that waited for another would hang."""
    try:
        seen = run(make_engine, case)
    except RuntimeError as error:
        return str(error)
    return f"no refusal, but {seen['said']}"


class Unaveraged(Replicated):
    """Where averages would fail before the optimizer is asked."""

    def backward(self, grads, is_bad):
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)


class FrozenOnOne(Unaveraged):
    def shard(self, model):
        model.norm.requires_grad_(rank() == 0)
        return model


class WithoutDdp(Unaveraged):
    """Each rank has begun with other values."""

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


def main(engine, folder):
    dist.init_process_group("gloo")
    if engine == "refusals":
        seen = run_refusals()
    else:
        # As plain tuples, which are equal to cases: a file cannot hold a class of __main__.
        seen = {tuple(case): run(ENGINES[engine], case) for case in CASES}
        seen |= {fault: run_broken(ENGINES[engine], fault) for fault in BROKEN}
    seen["ranks"] = dist.get_world_size()
    torch.save(seen, folder / f"rank{rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # two-rank CPU workers sometimes abort while the interpreter shuts down
