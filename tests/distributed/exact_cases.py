"""What the bare optimizer is stepped with on every engine: models, methods, losses and gradients.

The data come in four shares: one process averages all four, and each of two ranks averages two. All numbers
are multiples of a power of two, so that no average is rounded, and the results have the same bits.
"""

from typing import NamedTuple

import torch
from torch import nn

from hf_noneuclid import METHODS, NonEuclideanDescent, create_optimizer, one_group
from hf_noneuclid.methods import create_groups, optimizer_arguments, resolve

SHARES, STEPS = 4, 7
LOSSES = (8.0, 12.0, 8.0, 20.0, 8.0, 24.0, 28.0)
OFFSETS = (-3.0, -1.5, 0.5, 4.0)  # of the shares' losses; they add up to nothing
LOWER_BOUND = 1.0
FIRST_STEP = 0.01  # of the slope: long enough to outweigh the initial parameters, too
# So high that Momo truncates some steps, and that the steps outweigh the initial parameters.
LEARNING_RATES = {"muon": 0.05, "scion": 0.05, "polargrad": 2e-3, "muonmax": 6e-4}
FEWER = {"full": 1, "one": 10, "none": 10}  # what the dual norms of the models are divided by, about
TINY, HUGE = 2.0**-83, 2.0**50  # about 1e-25 and 1e+15


class Case(NamedTuple):
    method: str
    nuclear_norm: str = "exact"
    polar_method: str = "svd"
    model: str = "full"
    scale: float = 1.0
    """Multiplies the gradient of one matrix."""
    starts_badly: bool = False
    """The first gradient is NaN, and one gradient is missing in the first good step."""
    lower_bound: float = LOWER_BOUND
    step_size: str | None = None
    """By default Momo or the rate, as the method's name says."""
    rate: float | None = None
    """By default the method's in ``LEARNING_RATES``."""

    @property
    def bad_gradient(self):
        return 0 if self.starts_badly else 2

    @property
    def missing_gradient(self):
        return 1 if self.starts_badly else 5

    @property
    def bad_loss(self):
        return 4

    @property
    def bounded_by(self):
        return self.step_size or ("momo" if self.method.endswith("_momo") else "rate")


SLOPED = [method for method in METHODS if not method.endswith("_momo")]
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
    Case("muonmax_momo", starts_badly=True),
    *(Case(method, nuclear, step_size="slope") for method in SLOPED for nuclear in ("exact", "stale")),
    *(Case(method, step_size="slope", rate=rate) for method in SLOPED for rate in (1.0, 4.0)),
    *(Case("muonmax", step_size="momo+slope", starts_badly=x) for x in (False, True)),
    # The first loss, of a bad step, is below this number, the second is above it, and the third is below it.
    Case("muonmax", step_size="momo+slope", starts_badly=True, lower_bound=10.0),
    *(Case("scion", step_size="slope", model=model) for model in ("one", "none")),
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
    """Computes the inner product of the module's own parameters with given gradients."""

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
        """Modules without gradients take no part."""
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
    """The model of a case. Its parameters are small, so that the steps outweigh them."""
    model, generator = MODELS[case.model](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            # With a huge gradient and a parameter of normal size, Σ⟨p, g⟩ would drown the loss.
            p /= max(1.0, case.scale) if name == SCALED else 1.0
    return model


def make_optimizer(case, model, merged):
    """The optimizer of a case. Some parameters decay. For DeepSpeed, all are in one group."""
    # The bound is far below the model, so that their difference keeps its digits.
    bound = {"loss_lower_bound": case.lower_bound}
    options = {
        "polar_method": case.polar_method,
        "nuclear_norm": case.nuclear_norm,
        "momentum": 0.5,
        "beta2": 0.75,
        "matrix_lr_scale": 2.0,
        "step_size": case.bounded_by,
        **(bound if "momo" in case.bounded_by else {}),
        **({"first_step": FIRST_STEP} if "slope" in case.bounded_by else {}),
    }
    name = case.method.removesuffix("_momo")
    lr = case.rate or LEARNING_RATES[name] * FEWER[case.model] ** (1 if name in ("muon", "scion") else 2)
    decay = {"weight_decay": 2.0, "decay_parameters": ["up.weight", "experts.down_proj", "norm.weight"]}
    if not merged:
        return create_optimizer(model, case.method, lr=lr, **decay, **options)
    settings, tuning = resolve(case.method, **options)
    scale = tuning.pop("matrix_lr_scale")
    groups = one_group(create_groups(model, settings, matrix_lr_scale=scale, **decay))
    return NonEuclideanDescent(groups, lr, **optimizer_arguments(settings, tuning))


def gradients(case):
    """The gradients of every step by name, of shape (shares, ...)."""
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
