"""The Hugging Face Trainer: the methods by name, the loss for Momo, the step size in the logs.

``register`` adds the methods to the Trainer's registry of optimizers, and a callback that does nothing until
a Trainer trains with one of them. Only then is ``Accelerator.backward`` observed: every loss passes through
it once, whatever a subclass of the Trainer does. ``NonEuclidTrainerMixin`` does the same for one Trainer.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .groups import one_group
from .log import StepLog
from .methods import (
    all_names,
    canonical_name,
    create_groups,
    optimizer_arguments,
    parse_options,
    resolve,
)
from .optimizer import NonEuclideanDescent

try:
    import transformers
    import transformers.trainer as hf_trainer
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from packaging.version import Version
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args
    from transformers.training_args import OptimizerNames

    from .engine import check_engine, check_innermost, check_world_size, steps_group_by_group
except ImportError as error:
    raise ImportError(
        f"hf_noneuclid needs transformers >= 5.3 and accelerate for the Trainer ({error}). "
        "Install them with: pip install 'hf_noneuclid[trainer]'"
    ) from error

_MixedInto: Any = object  # whatever Trainer a user mixes it into

logger = logging.getLogger(__name__)

_MIXED_INTO: ContextVar[tuple[Any, dict[str, Any]] | None] = ContextVar("mixed_into", default=None)
"""The NonEuclidTrainerMixin that is making its optimizer, and its options."""

# ---------------------------------------------------------------- the loss


class _LossObserver:
    """Passes the loss of every backward to the optimizers of an accelerator.

    A window of accumulation ends with the backward that synchronises gradients, whether or not a step
    follows: a loss scaler may skip the step, and this loss must not be added to the next window.
    """

    def __init__(self) -> None:
        self._window_is_over: WeakKeyDictionary[Accelerator, bool] = WeakKeyDictionary()

    def observe(self, accelerator: Accelerator, loss: Tensor, **kwargs: Any) -> None:
        share = loss.detach() / _accumulation_divisor(accelerator, **kwargs)
        begin = self._window_is_over.get(accelerator, True)
        for optimizer in map(find_optimizer, accelerator._optimizers):
            if optimizer is not None:
                optimizer.observe_loss(share, begin=begin)
        self._window_is_over[accelerator] = accelerator.sync_gradients


def _accumulation_divisor(accelerator: Accelerator, scale_wrt_gas: bool = True, **_: Any) -> int:
    """The number by which ``backward`` divides the loss. The Trainer divides before, and sets it to 1."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return int(accelerator.gradient_accumulation_steps)
    engine = accelerator.deepspeed_engine_wrapped.engine
    return int(engine.gradient_accumulation_steps()) if scale_wrt_gas else 1


def _warn_of_double_division(args: Any) -> None:
    """Before transformers 5.6 accelerate divides the loss, too, after the Trainer has done so."""
    steps = args.gradient_accumulation_steps
    if steps > 1 and Version(transformers.__version__) < Version("5.6"):
        logger.warning(
            "transformers %s divides most losses by the %d accumulation steps twice, so that loss and "
            "gradients are %d times too small, and so are the steps of the regularized methods (polargrad, "
            "muonmax). Use transformers 5.6 or later.",
            transformers.__version__,
            steps,
            steps,
        )


def find_optimizer(optimizer: Any) -> NonEuclideanDescent | None:
    """The NonEuclideanDescent inside the wrappers of accelerate and DeepSpeed, if there is one."""
    while optimizer is not None and not isinstance(optimizer, NonEuclideanDescent):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


_OBSERVER = _LossObserver()
_OBSERVED_ALONE: WeakSet[Accelerator] = WeakSet()
"""Accelerators whose own ``backward`` is observed, by a NonEuclidTrainerMixin."""
_FED_ALONE: WeakSet[NonEuclideanDescent] = WeakSet()
"""The optimizers of these accelerators."""


def _observed(backward: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(backward)
    def observed_backward(accelerator: Accelerator, loss: Tensor, **kwargs: Any) -> None:
        if accelerator not in _OBSERVED_ALONE:
            # Before the backward, because DeepSpeed takes the step inside it.
            _OBSERVER.observe(accelerator, loss, **kwargs)
        backward(accelerator, loss, **kwargs)

    observed_backward.observes_loss = True  # type: ignore[attr-defined]
    return observed_backward


def observe_all_accelerators() -> None:
    """Observes the loss of every accelerator in this process. May be called again."""
    if not getattr(Accelerator.backward, "observes_loss", False):
        Accelerator.backward = _observed(Accelerator.backward)


def observe_accelerator(accelerator: Accelerator) -> None:
    """Observes the loss of one accelerator, and leaves the class alone. May be called again."""
    if accelerator in _OBSERVED_ALONE:
        return
    backward = accelerator.backward

    @functools.wraps(backward)
    def observed_backward(loss: Tensor, **kwargs: Any) -> None:
        _OBSERVER.observe(accelerator, loss, **kwargs)
        backward(loss, **kwargs)

    accelerator.backward = observed_backward
    _OBSERVED_ALONE.add(accelerator)


# ---------------------------------------------------------------- the log


class NonEuclidCallback(TrainerCallback):
    """Observes the loss and logs the step size if the optimizer is ours; does nothing otherwise."""

    def __init__(self) -> None:
        self._log: StepLog | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _name(args.optim) in all_names():
            check_engine()
            check_world_size(args.resume_from_checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = find_optimizer(kwargs.get("optimizer"))
        if _name(args.optim) in all_names():
            check_innermost(kwargs.get("optimizer"), optimizer, _name(args.optim))
        self._log = None if optimizer is None else StepLog(optimizer)
        if optimizer is not None:
            _warn_of_double_division(args)
            if optimizer not in _FED_ALONE:
                observe_all_accelerators()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = find_optimizer(kwargs.get("optimizer"))
        if optimizer is not None and state.global_step == 1:
            optimizer.diagnostics()  # warns early of a lower bound above the first loss

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._log is not None and "learning_rate" in logs:
            metrics = self._log.read(state.global_step)
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log is not None:
            self._log.read(state.global_step)


# ---------------------------------------------------------------- by name


def _make_optimizer_arguments(
    method: str, args: Any, model: nn.Module, decay_parameters: list[str], values: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of NonEuclideanDescent, ``params`` included, for a Trainer."""
    check_engine()
    settings, tuning = resolve(method, **values)
    scale = {key: tuning[key] for key in ("matrix_lr_scale",) if key in tuning}
    groups = create_groups(
        model,
        settings,
        weight_decay=args.weight_decay,
        decay_parameters=decay_parameters,
        target_modules=args.optim_target_modules,
        **scale,
    )
    groups = one_group(groups) if steps_group_by_group() else groups
    return {"params": groups, "lr": args.learning_rate, **optimizer_arguments(settings, tuning)}


def _handle(context: OptimizerContext) -> tuple[type[NonEuclideanDescent], dict[str, Any]]:
    """Called by the registry. It returns a class with ``params``: other libraries extend a factory's keys."""
    name, args, model = _name(context.args.optim), context.args, context.model
    if model is None:
        raise ValueError(f"optim={name!r} needs the model, in order to tell matrices from vectors.")
    mixed_into = _MIXED_INTO.get()
    if mixed_into is None:
        # The context does not hold the Trainer, but this method reads nothing from its instance.
        decay = Trainer.get_decay_parameter_names(None, model)
        values = parse_options(context.optim_args)
    else:
        trainer, values = mixed_into
        decay = trainer.get_decay_parameter_names(model)
    return NonEuclideanDescent, _make_optimizer_arguments(name, args, model, decay, values)


def register() -> None:
    """Adds the methods to the Trainer's registry, and the callback. May be called again."""
    for name in all_names():
        if name in OptimizerNames._value2member_map_:
            member = OptimizerNames(name)
            if _OPTIMIZER_HANDLERS.get(member) is not _handle:
                logger.warning(
                    "transformers has its own optimizer %r, which stays in place; ours is "
                    "hf_noneuclid.create_optimizer(model, %r, ...).",
                    name,
                    name,
                )
            continue
        _OPTIMIZER_HANDLERS[_add_member(name)] = _handle
    if NonEuclidCallback not in hf_trainer.DEFAULT_CALLBACKS:
        # It comes first, so that other callbacks report what it adds to the logs.
        hf_trainer.DEFAULT_CALLBACKS.insert(0, NonEuclidCallback)


def _add_member(value: str) -> OptimizerNames:
    """Adds a member to OptimizerNames, by which TrainingArguments checks and pickles names."""
    member = str.__new__(OptimizerNames, value)
    member._name_ = value.upper().replace("-", "__")
    member._value_ = value
    type.__setattr__(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[value] = member
    return member


# ---------------------------------------------------------------- by class


class NonEuclidTrainerMixin(_MixedInto):
    """Makes a Trainer use a method of this package, and observes only the loss of its own accelerator.

    It stands before the class of the Trainer: ``class MyTrainer(NonEuclidTrainerMixin, SFTTrainer)``. If
    ``args.optim`` names one of our methods, this method is used, with ``args.optim_args``; otherwise the
    two attributes below are used.

    Attributes:
        method: Name of the method.
        method_options: Its options, as in ``create_optimizer``.
    """

    method: str = "muonmax_momo"
    method_options: dict[str, Any] = {}  # noqa: RUF012  (a default that subclasses replace)

    optimizer: Any

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        check_engine()
        observe_accelerator(self.accelerator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            method, values = self._method_and_options()
            with self._asking_for(method, values):
                super().create_optimizer(*args, **kwargs)
            if find_optimizer(self.optimizer) is None:
                raise RuntimeError(
                    f"{type(self).__name__} trains with {method!r}, but an inherited create_optimizer made "
                    f"{type(self.optimizer).__name__}. Pass optimizers=(hf_noneuclid.create_optimizer("
                    "...), None)."
                )
        optimizer: torch.optim.Optimizer = self.optimizer
        if (ours := find_optimizer(optimizer)) is not None:
            _FED_ALONE.add(ours)
        return optimizer

    @contextmanager
    def _asking_for(self, method: str, values: dict[str, Any]) -> Iterator[None]:
        """Asks by name in the Trainer's own way, because a subclass may add parameters of its own."""
        asked, self.args.optim = self.args.optim, OptimizerNames(method)
        token = _MIXED_INTO.set((self, values))
        try:
            yield
        finally:
            _MIXED_INTO.reset(token)
            self.args.optim = asked

    def _method_and_options(self) -> tuple[str, dict[str, Any]]:
        asked, default = (_name(optim) for optim in (self.args.optim, _default_optim(self.args)))
        values = parse_options(_parse_optim_args(self.args.optim_args))
        if asked in all_names():
            return asked, values
        if asked != default:
            raise ValueError(
                f"{type(self).__name__} trains with {self.method!r}, but optim={asked!r} was asked for. "
                "Leave optim at its default, name one of our methods there, or use another Trainer."
            )
        return canonical_name(self.method), {**self.method_options, **values}


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _default_optim(args: Any) -> Any:
    return next(field.default for field in dataclasses.fields(args) if field.name == "optim")


class NonEuclidTrainer(NonEuclidTrainerMixin, Trainer):
    """The Trainer, with the optimizers of this package."""
