"""The options of the optimizer: which there are, and which values they take."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .momo import BOUND_RULES, DESCENTS
from .norms import NORMS
from .polar import POLAR_METHODS
from .product_norms import PRODUCT_NORMS

NuclearNorm = Literal["exact", "stale", "frobenius"]
NUCLEAR_NORMS: tuple[str, ...] = get_args(NuclearNorm)

Rule = tuple[Callable[[Any], bool], str]


def _number(test: Callable[[float], bool], words: str) -> Rule:
    def holds(x: Any) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and test(x)

    return holds, words


def _count(words: str) -> Rule:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1, words


def _one_of(values: Sequence[str]) -> Rule:
    return lambda x: isinstance(x, str) and x in values, "one of " + ", ".join(values)


def _number_or(names: Sequence[str]) -> Rule:
    is_number, words = _number(lambda x: True, "a finite number")
    is_name, _ = _one_of(names)
    return lambda x: is_number(x) or is_name(x), f"{words}, or one of {', '.join(names)}"


def _boolean() -> Rule:
    return lambda x: isinstance(x, bool), "True or False"


OPTIMIZER_OPTIONS: dict[str, Rule] = {
    "lr": _number(lambda x: x >= 0, "a finite number >= 0"),
    "descent": _one_of(DESCENTS),
    "product_norm": _one_of(PRODUCT_NORMS),
    "momo": _boolean(),
    "loss_lower_bound": _number_or(BOUND_RULES),
    "lower_bound_fraction": _number(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "lower_bound_horizon": _number(lambda x: x >= 1, "a number of steps >= 1"),
    "lower_bound_slack": _number(lambda x: x >= 0, "a finite number >= 0"),
    "momentum": _number(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "beta2": _number(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "eps": _number(lambda x: x > 0, "a finite number > 0"),
    "weight_decay": _number(lambda x: x >= 0, "a finite number >= 0"),
    "spectral_scale": _number(lambda x: x > 0, "a finite number > 0"),
    "polar_method": _one_of(POLAR_METHODS),
    "polar_steps": _count("an integer >= 1"),
    "nuclear_norm": _one_of(NUCLEAR_NORMS),
    "reuse_gradients": _boolean(),
    "workspace": _count("an integer >= 1, in MiB"),
}

PARAMETER_OPTIONS: dict[str, Rule] = {
    "norm": _one_of(NORMS),
    "weight_decay": OPTIMIZER_OPTIONS["weight_decay"],
    "spectral_scale": OPTIMIZER_OPTIONS["spectral_scale"],
    "lr_scale": _number(lambda x: x > 0, "a finite number > 0"),
    "flatten": _boolean(),
}
"""What may differ between groups, or, given as a list, between the parameters of a group."""

LOWER_BOUND_OPTIONS = (
    "loss_lower_bound",
    "lower_bound_fraction",
    "lower_bound_horizon",
    "lower_bound_slack",
)

METHOD_OPTIONS = ("descent", "product_norm", "momo", "norm")
"""What makes a method: a checkpoint that differs in one of these belongs to another optimizer."""

_FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr"})


def check(values: Mapping[str, Any], rules: Mapping[str, Rule] | None = None, where: str = "") -> None:
    """Checks options by their rules.

    Args:
        values: Names and values.
        rules: By default those of the optimizer.
        where: Names the place in the message.

    Raises:
        ValueError: An option is unknown (the known ones are listed) or out of range.
    """
    rules = OPTIMIZER_OPTIONS if rules is None else rules
    check_known(values, rules, where)
    for name, value in values.items():
        holds, words = rules[name]
        if not holds(value):
            raise ValueError(f"{where}{name} must be {words}, not {value!r}.")


def check_known(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raises ValueError, with the known names, if one is not among them."""
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{where}unknown option {name!r}; known are {', '.join(known)}.")


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], index: int) -> None:
    """Checks the options of a group before it is added.

    Raises:
        ValueError: An option is unknown or out of range, or is global and differs from the others' value.
    """
    where = f"parameter group {index}: "
    given = {key: value for key, value in group.items() if key not in _FOREIGN_KEYS}
    check_known(given, {*OPTIMIZER_OPTIONS, *PARAMETER_OPTIONS}, where)
    if "norm" not in given:
        raise ValueError(
            f'{where}no norm. Add "norm": one of {", ".join(NORMS)}. (A Trainer that makes groups by itself, '
            "for learning rates that differ between parameters, cannot be used: there is one learning rate.)"
        )
    for name, value in given.items():
        if name in PARAMETER_OPTIONS:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                check({name: one}, PARAMETER_OPTIONS, where)
        elif value != defaults[name]:
            raise ValueError(
                f"{where}{name} is {value!r} here and {defaults[name]!r} in the optimizer; it must be "
                "the same for all groups."
                + (" Use lr_scale to scale a group's steps." if name == "lr" else "")
            )


def check_parameters(group: Mapping[str, Any]) -> None:
    """Checks the parameters of a group, as torch has put it together.

    Raises:
        ValueError: A parameter is complex, or a list of options does not fit the number of parameters.
    """
    for name, param in zip(parameter_names(group, 0, len(group["params"])), group["params"], strict=True):
        if not param.is_floating_point():
            raise ValueError(
                f"{name} has dtype {param.dtype}; only real floating-point parameters have a norm here."
            )
    for option in PARAMETER_OPTIONS:
        value = group[option]
        if isinstance(value, (list, tuple)) and len(value) != len(group["params"]):
            raise ValueError(
                f"{option} has {len(value)} entries for {len(group['params'])} parameters of its group."
            )


def check_views(groups: Sequence[Mapping[str, Any]]) -> None:
    """Checks that no two parameters of any groups share memory: both would be stepped.

    Raises:
        ValueError: Two do.
    """
    spans = []
    for i, group in enumerate(groups):
        names = parameter_names(group, i, len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            if param.numel() and not param.is_meta and not hasattr(param, "device_mesh"):
                last = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
                start = param.data_ptr()
                spans.append((str(param.device), start, start + (last + 1) * param.element_size(), name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"{name} and {other} share memory, so a step would move it twice. Tie weights by making them "
                "the same Parameter, and pass it once."
            )


def parameter_names(group: Mapping[str, Any], index: int, count: int) -> list[str]:
    """The names of the ``count`` parameters of a group, made up where the caller gave none."""
    names = group.get("param_names")
    return list(names) if names else [f"group{index}.param{i}" for i in range(count)]


def per_parameter(group: Mapping[str, Any], option: str, count: int) -> list[Any]:
    """An option's value for each of the ``count`` parameters of a group."""
    value = group[option]
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def one_group(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of named parameters as a single one, in which lists hold what differs between parameters.

    DeepSpeed steps group by group, but a step depends on all parameters.
    """
    merged: dict[str, Any] = {"params": [pair for group in groups for pair in group["params"]]}
    defaults = {"lr_scale": 1.0, "flatten": False}
    for option in sorted({key for group in groups for key in group} - {"params"}):
        merged[option] = [
            value
            for group in groups
            for value in per_parameter({**defaults, **group}, option, len(group["params"]))
        ]
    return [merged]


def common_lr(groups: Sequence[Mapping[str, Any]]) -> float:
    """The one learning rate of all groups.

    Raises:
        ValueError: They differ.
    """
    rates = {float(group["lr"]) for group in groups}
    if len(rates) > 1:
        raise ValueError(
            f"the groups have different learning rates, {sorted(rates)}; there is one η. Use lr_scale to "
            "scale a group's steps."
        )
    return rates.pop()


def check_gradient(grad: Tensor, name: str) -> None:
    """Raises RuntimeError if a gradient is sparse."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({grad.layout}), and no norm here is defined on such a one. "
            "Use sparse=False in its nn.Embedding."
        )


def check_checkpoint(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares the options of a group with those of its checkpoint, which will replace them.

    Raises:
        ValueError: The checkpoint is of another method. Other differences are warned of.
    """
    for name in METHOD_OPTIONS:
        if saved.get(name) != ours[name]:
            raise ValueError(
                f"the checkpoint was made with {name}={saved.get(name)!r}, this optimizer with "
                f"{name}={ours[name]!r}. Go on with the method of the checkpoint, or start without its state."
            )
    for name in {*OPTIMIZER_OPTIONS, *PARAMETER_OPTIONS} - {"lr"}:
        if saved.get(name) != ours[name]:
            warnings.warn(
                f"{name}={saved.get(name)!r} is taken from the checkpoint, not {ours[name]!r}.", stacklevel=4
            )


def check_momentum(param: Tensor, saved: Tensor | None) -> None:
    """Raises ValueError if the momentum that was saved for a parameter has another shape."""
    if saved is not None and saved.shape != param.shape:
        raise ValueError(
            f"the checkpoint holds momentum of shape {tuple(saved.shape)} for a parameter (or a rank's part "
            f"of all) of shape {tuple(param.shape)}: it is of another model, or, under DeepSpeed ZeRO, of "
            "another number of processes. Resume with as many as it was made with."
        )
