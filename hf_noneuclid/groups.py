"""Parameter groups: what stands in them, and whether it fits the optimizer and a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import options
from .norms import NORMS
from .options import Options, ParameterOptions

PARAMETER_OPTIONS = tuple(options.fields(ParameterOptions))
PARAMETER_DEFAULTS = {
    name: field.default
    for name, field in options.fields(ParameterOptions).items()
    if field.default is not dataclasses.MISSING
}

_FOREIGN_KEYS = frozenset({"params", "param_names", "initial_lr"})


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

    Raises:
        ValueError: Some of the groups have an option that others lack.
    """
    merged: dict[str, Any] = {"params": [pair for group in groups for pair in group["params"]]}
    for option in sorted({key for group in groups for key in group} - {"params"}):
        merged[option] = []
        for i, group in enumerate(groups):
            full = {"lr_scale": 1.0, "flatten": False, **group}
            if option not in full:
                raise ValueError(
                    f"parameter group {i} has no {option}, and other groups have one. Give it to all."
                )
            merged[option] += per_parameter(full, option, len(group["params"]))
    return [merged]


# ---------------------------------------------------------------- checks


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], index: int) -> None:
    """Checks the options of a group before it is added.

    Raises:
        ValueError: An option is unknown or out of range, or is global and differs from the others' value.
    """
    where = f"parameter group {index}: "
    given = {key: value for key, value in group.items() if key not in _FOREIGN_KEYS}
    options.check_known(given, {"lr", *options.fields(Options, ParameterOptions)}, where)
    if "norm" not in given:
        raise ValueError(f'{where}no norm. Add "norm": one of {", ".join(NORMS)}.')
    for name, value in given.items():
        if name in PARAMETER_OPTIONS:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                options.check({name: one}, [ParameterOptions], where)
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
            # DTensors and meta tensors have no address of their own.
            if param.numel() and not param.is_meta and not hasattr(param, "device_mesh"):
                last = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
                start = param.data_ptr()
                spans.append((str(param.device), start, start + (last + 1) * param.element_size(), name))
    spans.sort()  # by device and address: parameters that overlap are neighbours
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"{name} and {other} share memory, so a step would move it twice. Tie weights by making them "
                "the same Parameter, and pass it once."
            )


def check_checkpoint(ours: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Compares the groups of an optimizer with those of its checkpoint, which will replace them.

    Raises:
        ValueError: The checkpoint is of another optimizer or method, parameters have another norm in it, or
            an option has a value that was removed since. Other differences are warned of.
    """
    if saved and "descent" not in saved[0]:
        known = ", ".join(sorted(set(saved[0]) - _FOREIGN_KEYS))
        raise ValueError(
            f"the checkpoint was made by another optimizer, with the options {known}. Go on with that one, "
            "or start from the checkpoint's model alone."
        )
    pairs = list(zip(ours, saved, strict=False))
    for now, before in pairs:
        _check_same(now, before, ("descent", "product_norm", "step_size"))
    _check_norms(ours, saved)
    for now, before in pairs:
        _check_same(now, before, ("norm",))
        _warn_of_differences(now, before)


def _check_norms(ours: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuses parameters that were matrices and are vectors now, or the reverse."""
    now, before = _norm_by_name(ours), _norm_by_name(saved)
    moved = [name for name, norm in before.items() if now.get(name, norm) != norm]
    if moved:
        names = ", ".join(f"{name} ({before[name]}, now {now[name]})" for name in moved[:6])
        raise ValueError(
            f"{len(moved)} parameters had another norm when the checkpoint was made: {names}"
            f"{', ...' if len(moved) > 6 else ''}. Resume with the method and optim_target_modules of the "
            "checkpoint, or start from its model alone."
        )


def _norm_by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The norm of every parameter whose name is known."""
    return {
        name: norm
        for group in groups
        for name, norm in zip(
            group.get("param_names") or [], per_parameter(group, "norm", len(group["params"])), strict=False
        )
    }


def _check_same(ours: Mapping[str, Any], saved: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if saved.get(name) != ours[name]:
            raise ValueError(
                f"the checkpoint was made with {name}={saved.get(name)!r}, this optimizer with "
                f"{name}={ours[name]!r}. Go on with the method of the checkpoint, or start without its state."
            )


def _warn_of_differences(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    Options.of({**ours, **saved}, "the checkpoint cannot be resumed, start from its model alone: ")
    for name in options.fields(Options, ParameterOptions):
        if name in saved and saved[name] != ours[name]:
            warnings.warn(
                f"{name}={saved.get(name)!r} is taken from the checkpoint, not {ours[name]!r}.", stacklevel=5
            )


def check_momentum(param: Tensor, saved: Tensor | None) -> None:
    """Raises ValueError if the momentum that was saved for a parameter has another shape."""
    if saved is not None and saved.shape != param.shape:
        raise ValueError(
            f"the checkpoint holds momentum of shape {tuple(saved.shape)} for a parameter (or a rank's part "
            f"of all) of shape {tuple(param.shape)}: it is of another model, or, under DeepSpeed ZeRO, of "
            "another number of processes. Resume with as many as it was made with."
        )
