"""Takes the steps of a case on an engine, as the optimizer is or with a fault, and records them."""

import torch
from counting import Flops
from exact_cases import BROKEN, LOSSES, OFFSETS, SHARES, gradients
from exact_engines import local, rank, world

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.distributed import ProcessGrid
from hf_noneuclid.distributed.exchange import Exchange
from hf_noneuclid.elementwise import as_scalar


def snapshot(engine):
    """Everything on this rank that a bad step must not change."""
    state = engine.optimizer.state.values()
    return [*engine.parts(), *(local(x).clone() for its in state for x in its.values())]


def count_bytes(optimizer):
    """Bytes of the state on this rank, of its large parts, and of float32 parameters."""
    state = optimizer.state
    held = {id(x): local(x) for its in state.values() for x in its.values()}

    def named(key):
        return sum(local(its[key]).nbytes for its in state.values() if key in its)

    return {
        "all": sum(x.nbytes for x in held.values()),
        "momenta": named("momentum"),
        "second_moments": named("second_moment"),
        "last_steps": named("last_step"),
        "float32": 4 * sum(local(p).numel() for p in state),
    }


def run(engine_class, case):
    """Takes the steps of a case, and returns a record of them."""
    engine = engine_class(case)
    seen = {"diagnostics": [], "unchanged": []}
    mine = slice(rank() * SHARES // world(), (rank() + 1) * SHARES // world())
    with Flops() as flops:
        for step, shares in enumerate(gradients(case)):
            before, last = snapshot(engine), rank() == world() - 1
            grads = {name: x[mine].mean(0) for name, x in shares.items()}
            loss = LOSSES[step] + torch.tensor(OFFSETS[mine]).mean().item()
            engine.backward(grads, is_bad=last and step == case.bad_gradient)
            engine.step(torch.nan if last and step == case.bad_loss else loss)
            seen["diagnostics"].append(engine.optimizer.diagnostics())
            same = [torch.equal(x, y) for x, y in zip(before, snapshot(engine), strict=False)]
            seen["unchanged"].append(all(same))
    seen |= {"parameters": engine.parameters(), "bytes": count_bytes(engine.optimizer), "flops": flops.count}
    engine.close()
    return seen


# ---------------------------------------------------------------- runs that must not agree


def one_ranks_loss(self, plan, loss, must_move):
    return _check(self, plan, loss, must_move)._replace(loss=as_scalar(loss, plan.like))


def one_ranks_dual(self, plan, checked):
    ProcessGrid.sum = lambda self, x: x
    dual = _measure(self, plan, checked)
    ProcessGrid.sum = _sum
    return dual


def first_fragment_only(flat, block, held):
    """A rank sends zeros if another one has the beginning of the block."""
    fragment = _fragment(flat, block, held)
    return torch.zeros_like(fragment) if block.interval[0] < held[0] else fragment


_check, _measure = NonEuclideanDescent._check, NonEuclideanDescent._measure
_sum, _fragment = ProcessGrid.sum, Exchange._fragment
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
