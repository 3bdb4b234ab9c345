"""The methods of the paper as settings of one rule.

A method named ``_momo`` finds its step size by the slope and by Momo. That is more than the paper's Momo,
which is ``step_size=momo`` with ``loss_lower_bound=0.0`` and ``decay_at=rate``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import options
from .momo import Descent
from .norms import VectorNormName
from .optimizer import NonEuclideanDescent
from .options import MethodOptions, Options, StepSizeName
from .product_norms import ProductNormName
from .routing import route_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """Descent, product norm, the norm of the vectors, and what bounds the step size."""

    descent: Descent
    product_norm: ProductNormName
    vector_norm: VectorNormName
    step_size: StepSizeName = "rate"

    @property
    def momo(self) -> bool:
        """Whether a model of the loss bounds the step size."""
        return "momo" in self.step_size


_PLAIN = {
    "muon": Method("constrained", "linf", "ada_linf"),
    "scion": Method("constrained", "linf", "linf"),
    "polargrad": Method("regularized", "l2", "ada_l2"),
    "muonmax": Method("regularized", "hybrid", "ada_l2"),
}

DEFAULT_STEP_SIZE: StepSizeName = "momo+slope"
"""Of the methods named ``_momo``. They need no learning rate; one of 1 hardly ever bounds a step."""

METHODS: dict[str, Method] = {
    **_PLAIN,
    **{
        f"{name}_momo": Method(m.descent, m.product_norm, m.vector_norm, DEFAULT_STEP_SIZE)
        for name, m in _PLAIN.items()
    },
}
"""Every named method. ``muon`` is the paper's MuonAdam. The plain ones step at the learning rate."""

FREE_METHOD = "noneuclid"
"""The method whose descent, product norm and vector norm are options."""

ALIASES: dict[str, str] = {
    "muonadam": "muon",
    "muonadam_momo": "muon_momo",
    "momo_muonadam": "muon_momo",
    **{f"momo_{name}": f"{name}_momo" for name in _PLAIN},
}

DEFAULT_MATRIX_LR_SCALE: float = options.default_of(MethodOptions, "matrix_lr_scale")
_CHOICES = ("descent", "product_norm", "vector_norm")
"""What makes a method; options of ``noneuclid`` alone."""
_BY_PARAMETER = ("weight_decay", "spectral_scale")
"""What a method does not take as an option, since the routing says it for each parameter."""


def canonical_name(name: str) -> str:
    """The method's own name for a name, an alias, or either with hyphens.

    Raises:
        ValueError: There is no such method; the known ones are listed.
    """
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain != FREE_METHOD and plain not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join([*METHODS, FREE_METHOD])}.")
    return plain


def all_names() -> list[str]:
    """Every name that ``canonical_name`` knows, hyphenated ones included."""
    names = [*METHODS, FREE_METHOD, *ALIASES]
    return names + [name.replace("_", "-") for name in names if "_" in name]


def parse_options(text: Mapping[str, str]) -> dict[str, Any]:
    """Options given as text (``--optim_args "momentum=0.9,nuclear_norm=stale"``) as typed values.

    Unknown options stay text, so that ``resolve``, which knows the method, can refuse them.

    Raises:
        ValueError: The text of an option is not of its type.
    """
    known = options.fields(Options, MethodOptions)
    values: dict[str, Any] = {}
    for name, value in text.items():
        rule: options.Rule | None = known[name].metadata["rule"] if name in known else None
        try:
            values[name] = rule.parse(value) if rule else value
        except (ValueError, KeyError):
            assert rule is not None
            raise ValueError(f"option {name} {rule.refusal(value)}") from None
    return values


def step_size_of(method: str, values: Mapping[str, Any]) -> str:
    """The step size of a method with some options: the one that is asked for, or the method's own."""
    name = canonical_name(method)
    return str(values.get("step_size") or (METHODS[name].step_size if name in METHODS else "rate"))


def default_learning_rate(step_size: str) -> float | None:
    """The learning rate where nobody chose one: 1 if it only bounds another rule, None if all rests on it."""
    return None if step_size == "rate" else 1.0


def method_options(method: str, step_size: str | None = None) -> list[str]:
    """The names of the options that a method takes in ``--optim_args`` and ``create_optimizer``.

    Args:
        method: Any of ``all_names()``.
        step_size: The step size that was asked for; None for the method's own.
    """
    name = canonical_name(method)
    step_size = step_size or step_size_of(name, {})
    return [
        option
        for option, field in options.fields(Options, MethodOptions).items()
        if option not in _BY_PARAMETER
        and (field.metadata["only"] is None or field.metadata["only"] in step_size)
        and (name == FREE_METHOD or option not in _CHOICES)
    ]


def resolve(method: str, **values: Any) -> tuple[Method, dict[str, Any]]:
    """A method, and the options that tune it, checked.

    Args:
        method: Any of ``all_names()``.
        **values: Options of ``hf_noneuclid.options.Options`` and ``MethodOptions``; ``noneuclid`` requires
            ``descent``, ``product_norm`` and ``vector_norm``.

    Raises:
        ValueError: An option is unknown to this method, missing, or out of range.
    """
    name = canonical_name(method)
    where = f"method {name}: "
    options.check({key: values[key] for key in ("step_size",) if key in values}, [Options], where)
    options.check_known(values, method_options(method, values.get("step_size")), where)
    options.check(values, [Options, MethodOptions], where)
    if name == FREE_METHOD:
        if missing := [key for key in _CHOICES if key not in values]:
            rules = {key: options.fields(Options, MethodOptions)[key].metadata["rule"] for key in missing}
            choices = "; ".join(f"{key}: {rule.words}" for key, rule in rules.items())
            raise ValueError(f"{where}missing {', '.join(missing)} ({choices}).")
        settings = Method(**{key: values.pop(key) for key in _CHOICES})
    else:
        settings = METHODS[name]
    settings = dataclasses.replace(settings, step_size=values.pop("step_size", settings.step_size))
    return settings, values


def create_groups(
    model: nn.Module, method: Method, *, matrix_lr_scale: float = DEFAULT_MATRIX_LR_SCALE, **routing: Any
) -> list[dict[str, Any]]:
    """The parameter groups of a method. What went where is logged: a summary at INFO, the table at DEBUG."""
    groups, table = route_parameters(
        model, vector_norm=method.vector_norm, matrix_lr_scale=matrix_lr_scale, **routing
    )
    logger.info("%s", table.summary)
    logger.debug("matrices and vectors:\n%s", table)
    return groups


def create_optimizer(
    model: nn.Module,
    method: str = "muonmax_momo",
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay_parameters: Collection[str] | None = None,
    target_modules: str | Sequence[str] | None = None,
    **values: Any,
) -> NonEuclideanDescent:
    """Routes a model's parameters and makes the optimizer of a method for them.

    Args:
        model: Any module; the routing knows transformers' models best.
        method: A key of ``METHODS``, an alias, or ``noneuclid``.
        lr: Learning rate η. If the slope bounds the step size, as in the methods named ``_momo``, it is only
            an upper bound of the length of a step; 1 is the convention.
        weight_decay: Decoupled weight decay λ.
        decay_parameters: Names of the parameters that decay; by default all.
        target_modules: Chooses the matrices instead of the routing's rules, as in ``route_parameters``.
        **values: As of ``resolve``.

    Raises:
        TypeError: The model is not a module.
        ValueError: An unknown method or option, a value out of range, or a model without matrices.

    Example:
        >>> import torch, hf_noneuclid
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = hf_noneuclid.create_optimizer(model, "muonmax_momo", lr=1.0)
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> _ = optimizer.step(loss=loss)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"create_optimizer needs the model, not {type(model).__name__}: its modules tell matrices from "
            "vectors. For groups of your own, make a hf_noneuclid.NonEuclideanDescent."
        )
    settings, tuning = resolve(method, **values)
    groups = create_groups(
        model,
        settings,
        matrix_lr_scale=tuning.pop("matrix_lr_scale", DEFAULT_MATRIX_LR_SCALE),
        weight_decay=weight_decay,
        decay_parameters=decay_parameters,
        target_modules=target_modules,
    )
    return NonEuclideanDescent(groups, lr, **optimizer_arguments(settings, tuning))


def optimizer_arguments(method: Method, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``NonEuclideanDescent`` for a method, without ``params`` and ``lr``."""
    return {
        "descent": method.descent,
        "product_norm": method.product_norm,
        "step_size": method.step_size,
        **{key: value for key, value in tuning.items() if key != "matrix_lr_scale"},
    }
