"""The options of the optimizer, each declared once: name, type, range, default, and a line of help.

The constructor, parsing, checks, error texts and ``help(Options)`` derive from the fields of ``Options`` and
``ParameterOptions``. To add an option, add a field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args

from .momo import DESCENTS, Descent
from .norms import NORMS, VECTOR_NORMS, NormName, VectorNormName
from .polar import POLAR_METHODS, PolarMethod
from .product_norms import PRODUCT_NORMS, ProductNormName

NuclearNormName = Literal["exact", "stale", "frobenius"]
NUCLEAR_NORMS: tuple[str, ...] = get_args(NuclearNormName)

StepSizeName = Literal["rate", "momo", "slope", "momo+slope"]
STEP_SIZES: tuple[str, ...] = get_args(StepSizeName)

DecayName = Literal["step", "rate"]
DECAYS: tuple[str, ...] = get_args(DecayName)

# ---------------------------------------------------------------- what a value may be


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values an option takes."""

    words: str
    """Completes the sentence "it must be ..."."""
    holds: Callable[[Any], bool]
    parse: Callable[[str], Any] = str
    """Makes a value of text. Raises ValueError or KeyError if the text has another type."""
    removed: tuple[str, ...] = ()
    """Values that the option took once."""
    instead: str = ""
    """What to do instead of giving one of these."""

    def refusal(self, value: Any) -> str:
        """Completes an error that begins with the name of the option."""
        text = f"must be {self.words}, not {value!r}."
        return f"{text} {self.instead}" if str(value) in self.removed else text


def _integer(words: str, holds: Callable[[int], bool]) -> Rule:
    return Rule(words, lambda x: isinstance(x, int) and not isinstance(x, bool) and holds(x), int)


def _number(words: str, holds: Callable[[float], bool] = lambda x: True) -> Rule:
    def is_one(x: Any) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and holds(x)

    return Rule(words, is_one, float)


def _one_of(names: Sequence[str]) -> Rule:
    return Rule("one of " + ", ".join(names), lambda x: isinstance(x, str) and x in names)


_FRACTION = _number("a number in [0, 1)", lambda x: 0 <= x < 1)
_POSITIVE = _number("a finite number > 0", lambda x: x > 0)
_NOT_NEGATIVE = _number("a finite number >= 0", lambda x: x >= 0)
_LOWER_BOUND = dataclasses.replace(
    _number("a finite number"),
    removed=("auto", "relative", "star"),
    instead="The rules auto, relative and star were removed; step_size=momo+slope, the default of "
    "muonmax_momo, needs none of them.",
)
_COUNT = _integer("an integer >= 1", lambda x: x >= 1)
_BOOLEAN = Rule(
    "true or false", lambda x: isinstance(x, bool), lambda text: {"true": True, "false": False}[text.lower()]
)
_BOOLEAN_OR_NONE = Rule(
    "true, false or None",
    lambda x: x is None or isinstance(x, bool),
    lambda text: None if text.lower() == "none" else _BOOLEAN.parse(text),
)

# ---------------------------------------------------------------- the options


def _option(rule: Rule, help: str, default: Any = MISSING, *, only: str | None = None) -> Any:
    """A field with what is known of the option. ``only`` names the step size that it is for."""
    metadata = {"rule": rule, "help": help, "only": only}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What holds for all parameters of an optimizer."""

    descent: Descent = _option(_one_of(DESCENTS), "constrained: p ← p - τ c u; regularized: p ← p - τ D c u")
    product_norm: ProductNormName = _option(
        _one_of(PRODUCT_NORMS), "how the norms of all parameters make one norm"
    )
    step_size: StepSizeName = _option(
        _one_of(STEP_SIZES),
        "what bounds the step size. rate: the learning rate; momo: also a model of the loss, which needs "
        "the loss of every step; slope: also the slope along the last step, so that nobody need choose a "
        "learning rate",
        "rate",
    )
    first_step: float = _option(
        _POSITIVE, "length of the first step, in the product norm", 1e-5, only="slope"
    )
    loss_lower_bound: float = _option(
        _LOWER_BOUND,
        "F*, a lower bound of the loss; momo+slope drops it when a loss is below",
        0.0,
        only="momo",
    )
    momentum: float = _option(_FRACTION, "β, of the momentum and of the running loss", 0.95)
    beta2: float = _option(_FRACTION, "β₂, of the second moment", 0.95)
    eps: float = _option(_POSITIVE, "ε in a = ε + √v", 1e-8)
    weight_decay: float = _option(_NOT_NEGATIVE, "decoupled weight decay λ: p ← (1 - τλ) p", 0.0)
    decay_at: DecayName = _option(
        _one_of(DECAYS), "step: weights decay at the step size τ; rate: at the learning rate η", "step"
    )
    spectral_scale: float = _option(_POSITIVE, "s; the spectral norm is divided by it", 1.0)
    polar_method: PolarMethod = _option(
        _one_of(POLAR_METHODS), "how polar factors are computed", "polar_express"
    )
    polar_steps: int = _option(_COUNT, "iterations of polar_express and newton_schulz", 5)
    nuclear_norm: NuclearNormName = _option(
        _one_of(NUCLEAR_NORMS),
        "exact; stale: that of the step before, which keeps no polar factors; frobenius: ‖m‖_F",
        "exact",
    )
    reuse_gradients: bool = _option(
        _BOOLEAN,
        "keep the polar factors of an exact step in the memory of the gradients, which are lost; "
        "only where a rank holds the whole gradient of a matrix: one device, DDP, ZeRO-1 and 2",
        False,
    )
    workspace: float = _option(_POSITIVE, "MiB of temporary copies that a step may make at once", 256)
    foreach: bool | None = _option(
        _BOOLEAN_OR_NONE,
        "use few large calls and never read a value, as accelerators need; None: on all devices but the CPU",
        None,
    )

    @property
    def momo(self) -> bool:
        """Whether a model of the loss bounds the step size."""
        return "momo" in self.step_size

    @property
    def slope(self) -> bool:
        """Whether the slope along the last step bounds the step size."""
        return "slope" in self.step_size

    @classmethod
    def of(cls, group: Mapping[str, Any], where: str = "") -> Options:
        """The options in a parameter group.

        Args:
            group: It may have been saved by an older version.
            where: Names the place in an error.

        Raises:
            ValueError: A value is out of range.
        """
        values = {name: group[name] for name in fields(cls)}
        lists = fields(ParameterOptions)  # or single values
        check({name: value for name, value in values.items() if name not in lists}, [cls], where)
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterOptions:
    """What may differ between groups, or, as a list, between the parameters of a group."""

    norm: NormName = _option(
        _one_of(NORMS),
        "spectral: 2-D, a matrix; 3-D, a stack of matrices; more dimensions or flatten, one matrix of "
        "shape[0] rows. The other norms are for parameters of any shape",
    )
    weight_decay: float = _option(_NOT_NEGATIVE, "as in Options", 0.0)
    spectral_scale: float = _option(_POSITIVE, "as in Options", 1.0)
    lr_scale: float = _option(_POSITIVE, "multiplies the learning rate", 1.0)
    flatten: bool = _option(_BOOLEAN, "take a stack of matrices as one matrix of shape[0] rows", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """What ``create_optimizer`` and ``--optim_args`` take beside ``Options``."""

    vector_norm: VectorNormName = _option(
        _one_of(VECTOR_NORMS), "norm of all parameters that are not matrices"
    )
    matrix_lr_scale: float = _option(_POSITIVE, "multiplies the learning rate of the matrices", 10.0)


LEARNING_RATE = _NOT_NEGATIVE


def fields(*kinds: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of dataclasses of options by name; ``metadata`` holds ``rule``, ``help``, ``only``."""
    return {field.name: field for kind in kinds for field in dataclasses.fields(kind)}


def default_of(kind: type[Any], name: str) -> Any:
    """The default of an option."""
    return fields(kind)[name].default


def describe(kind: type[Any]) -> str:
    """The options of a dataclass as the Args of a docstring."""
    lines = []
    for name, field in fields(kind).items():
        rule: Rule = field.metadata["rule"]
        default = "" if field.default is MISSING else f" Default: {field.default}."
        words = rule.words[0].upper() + rule.words[1:]
        lines.append(f"{name}: {words}; {field.metadata['help']}.{default}")
    return "\n    ".join(lines)


for _kind in (Options, ParameterOptions, MethodOptions):
    _kind.__doc__ = f"{_kind.__doc__}\n\nArgs:\n    {describe(_kind)}\n"

# ---------------------------------------------------------------- checks


def check_known(names: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raises ValueError, with the known names, if one is not among them."""
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{where}unknown option {name!r}; known are {', '.join(known)}.")


def check(values: Mapping[str, Any], kinds: Sequence[type[Any]], where: str = "") -> None:
    """Checks options against their rules.

    Args:
        values: Names and values.
        kinds: The dataclasses that declare them.
        where: Names the place in the message.

    Raises:
        ValueError: An option is unknown (the known ones are listed) or out of range.
    """
    known = fields(*kinds)
    check_known(values, known, where)
    for name, value in values.items():
        check_value(name, value, known[name].metadata["rule"], where)


def check_value(name: str, value: Any, rule: Rule, where: str = "") -> None:
    """Raises ValueError if the rule does not hold for the value."""
    if not rule.holds(value):
        raise ValueError(f"{where}{name} {rule.refusal(value)}")
