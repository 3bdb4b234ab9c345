"""Takes the steps of a case on an engine, and says what was seen; or breaks the optimizer first."""

import torch
from counting import Flops
from exact_cases import BROKEN, LOSSES, OFFSETS, SHARES, gradients
from exact_engines import local, rank, world

from hf_noneuclid import NonEuclideanDescent, norms
from hf_noneuclid.layouts.exchange import Exchange
from hf_noneuclid.layouts.ranks import Ranks


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
