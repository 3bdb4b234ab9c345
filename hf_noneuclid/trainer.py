"""The Hugging Face Trainer: the methods by name, loss and clipping for Momo, the step size in the logs.

``register`` adds the methods to the Trainer's registry of optimizers, and a callback that does nothing until
a Trainer trains with one of them. Only if its step size needs Momo are accelerators observed, all of them
(``observation``). ``NonEuclidTrainerMixin`` does the same for one Trainer and its own accelerator.

Nobody need choose a learning rate: the Trainer's default, made for Adam, is replaced by 1 where it is only an
upper bound of the step size. The log says when it bounds steps after all.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

from .groups import one_group
from .log import StepLog
from .methods import (
    FREE_METHOD,
    METHODS,
    Method,
    all_names,
    canonical_name,
    create_groups,
    default_learning_rate,
    optimizer_arguments,
    parse_options,
    resolve,
)
from .optimizer import NonEuclideanDescent

try:
    import transformers
    import transformers.trainer as hf_trainer
    from packaging.version import Version
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, _parse_optim_args
    from transformers.training_args import OptimizerNames

    from .engine import (
        check_engine,
        check_innermost,
        check_world_size,
        engine_name,
        schedules_learning_rate,
        steps_group_by_group,
    )
    from .observation import (
        OBSERVER,
        find_optimizer,
        has_momo,
        observe,
        observe_all_accelerators,
    )
except ImportError as error:
    raise ImportError(
        f"hf_noneuclid needs transformers >= 5.3 and accelerate for the Trainer ({error}). "
        "Install them with: pip install 'hf_noneuclid[trainer]'"
    ) from error

_MixedInto: Any = object  # whatever Trainer a user mixes it into

logger = logging.getLogger(__name__)

_MIXED_IN: ContextVar[dict[str, Any] | None] = ContextVar("mixed_in", default=None)
"""The options of the NonEuclidTrainerMixin that is making its optimizer."""

_MODELS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""The models of the Trainers, by the ids of their arguments: some ask for an optimizer without the model."""

_FED_ALONE: WeakSet[NonEuclideanDescent] = WeakSet()
"""The optimizers of the accelerators that are observed alone."""

# ---------------------------------------------------------------- the log


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


class NonEuclidCallback(TrainerCallback):
    """Has losses observed and logs the step size if the optimizer is ours; does nothing otherwise."""

    def __init__(self) -> None:
        self._log: StepLog | None = None
        self._first_step = 1
        self._watched = range(0)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("model"), nn.Module):
            _MODELS[id(args)] = kwargs["model"]
            weakref.finalize(args, _MODELS.pop, id(args), None)
        if _name(args.optim) in all_names():
            _check_optim_args(args.optim_args)
            check_engine()
            check_world_size(args.resume_from_checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = find_optimizer(kwargs.get("optimizer"))
        if _name(args.optim) in all_names():
            check_innermost(kwargs.get("optimizer"), optimizer, _name(args.optim))
        self._log = None if optimizer is None else StepLog(optimizer)
        self._first_step = state.global_step + 1
        self._watched = _watched_steps(state.global_step, state.max_steps, args)
        if optimizer is not None:
            if isinstance(kwargs.get("model"), nn.Module):
                _check_sparse(kwargs["model"])
            _tell_resumed_rate(optimizer, args, state.global_step)
            logger.info("%s: %s; %s", _method(optimizer, args), _bounds(optimizer), engine_name())
            _warn_of_double_division(args)
            if has_momo(optimizer) and optimizer not in _FED_ALONE:
                observe_all_accelerators()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = find_optimizer(kwargs.get("optimizer"))
        if optimizer is None or self._log is None:
            return
        if state.global_step == 1:
            optimizer.diagnostics()  # warns early of a lower bound above the first loss
        if state.global_step == self._first_step and has_momo(optimizer) and (args.max_grad_norm or 0) > 0:
            _warn_of_unseen_clipping(optimizer)
        if state.global_step in self._watched and state.is_world_process_zero:
            self._log.watch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._log is not None and "learning_rate" in logs:
            metrics = self._log.read(state.global_step)
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log is not None:
            rest = self._log.read(state.global_step)
            if "limited_rate" in rest and state.log_history:  # the steps after the last log count, too
                state.log_history[-1]["limited_rate"] = rest["limited_rate"]
            if state.is_world_process_zero:
                self._log.tell_limited()


def _check_optim_args(optim_args: Any) -> None:
    """Refuses what the Trainer would fail to unpack."""
    if optim_args and not (
        isinstance(optim_args, str) and all(x.count("=") == 1 for x in optim_args.split(","))
    ):
        raise ValueError(
            "optim_args must be text, options and their values with = between them and commas after each, "
            f"such as 'momentum=0.9,nuclear_norm=stale', not {optim_args!r}."
        )


def _check_sparse(model: nn.Module) -> None:
    """Refuses sparse gradients before torch fails to clip them."""
    for name, module in model.named_modules():
        is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if is_sparse and module.weight.requires_grad:
            raise RuntimeError(f"{name}: sparse gradients have no norm here. Set its sparse=False.")


def _tell_resumed_rate(optimizer: NonEuclideanDescent, args: Any, step: int) -> None:
    asked = optimizer.defaults["lr"]
    saved = optimizer.param_groups[0].get("initial_lr", asked)
    if step > 0 and saved != asked and args.process_index == 0:
        logger.warning(
            "learning_rate=%g is taken from %s, not %g: the run goes on with its own schedule. For another "
            "rate, start from the checkpoint's model alone.",
            saved,
            args.resume_from_checkpoint
            if isinstance(args.resume_from_checkpoint, str)
            else f"the checkpoint of step {step}",
            asked,
        )


def _watched_steps(done: int, steps: int, args: Any) -> range:
    """Between which steps it is asked whether the learning rate bounds all of them.

    Each interval is a twentieth of the run, and ten steps at least. The first one begins when the step size
    has had time to grow, and when the warm-up is over. The last one ends with about a third of the run: near
    the end of a schedule, the learning rate may well be the bound.
    """
    length = max(10, math.ceil((steps - done) / 20))
    start = max(done + length, args.get_warmup_steps(steps))
    return range(start, start + 5 * length, length)


def _warn_of_unseen_clipping(optimizer: NonEuclideanDescent) -> None:
    if optimizer not in OBSERVER.knows_clipping:
        OBSERVER.warn(
            optimizer, "this Trainer does not clip gradients by Accelerator.clip_grad_norm_", "use it"
        )


def _method(optimizer: NonEuclideanDescent, args: Any) -> str:
    """The name that was asked for; where a class chose the method or the user passed it, what it is."""
    group = optimizer.param_groups[0]
    asked = _name(args.optim)
    return asked if asked in all_names() else f"{group['descent']} descent in {group['product_norm']}"


def _bounds(optimizer: NonEuclideanDescent) -> str:
    """What bounds the step size, in words."""
    group = optimizer.param_groups[0]
    rate = f"the learning rate, {group.get('initial_lr', group['lr']):g}"
    bounds = {
        "slope": "the slope along the last step",
        "momo": f"Momo with loss_lower_bound={group['loss_lower_bound']:g}",
    }
    its = [words for name, words in bounds.items() if name in group["step_size"]]
    if not its:
        return f"the step size is {rate}"
    return f"the step size is bounded by {', by '.join(its)} and by {rate}"


# ---------------------------------------------------------------- by name


def _make_optimizer_arguments(
    method: str, args: Any, model: nn.Module, values: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of NonEuclideanDescent for a Trainer, which adds its own groups."""
    check_engine()
    settings, tuning = resolve(method, **values)
    rates = {args.learning_rate}
    _choose_learning_rate(args, method, settings.step_size)
    rates.add(args.learning_rate)  # a Trainer may have made its groups before
    scale = {key: tuning[key] for key in ("matrix_lr_scale",) if key in tuning}
    route = functools.partial(_route, args, model, settings, rates, scale)
    return {"lr": args.learning_rate, "route": route, **optimizer_arguments(settings, tuning)}


def _route(
    args: Any,
    model: nn.Module,
    settings: Method,
    rates: set[float],
    scale: dict[str, float],
    params: Iterable[Any],
) -> list[dict[str, Any]]:
    """Groups with norms from the groups of a Trainer, which only say what decays, or from parameters.

    Raises:
        ValueError: A group has a learning rate or options of its own, two groups have the same parameter, or
            the model lacks one.
    """
    entries = list(params)
    given = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    remaining = {}
    for index, group in enumerate(given):
        _check_given(group, rates)
        its = group["params"]
        for entry in [its] if isinstance(its, Tensor) else its:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if id(parameter) in remaining:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in two groups.")
            if parameter.requires_grad:
                remaining[id(parameter)] = index
    groups = []
    for group in create_groups(model, settings, target_modules=args.optim_target_modules, **scale):
        by_given: dict[int, list[Any]] = {}
        for named in group["params"]:
            if id(named[1]) in remaining:
                by_given.setdefault(remaining.pop(id(named[1])), []).append(named)
        for index, alike in by_given.items():
            decay = given[index].get("weight_decay", args.weight_decay)
            groups.append({**group, "params": alike, "weight_decay": decay})
    if remaining:
        raise ValueError(
            f"{len(remaining)} of the parameters to train are not in {type(model).__name__}, whose modules "
            "tell matrices from vectors. Call get_optimizer_cls_and_kwargs(args, module) with one that has "
            "them, or pass optimizers=(hf_noneuclid.create_optimizer(...), None) to the Trainer."
        )
    return one_group(groups) if steps_group_by_group() else groups


def _check_given(group: dict[str, Any], rates: set[float]) -> None:
    """Refuses what a Trainer's group says and a step would ignore."""
    if "lr" in group and group["lr"] not in rates:
        raise ValueError(
            f"a group of parameters has a learning rate of its own, {group['lr']:g}; here is one for all, "
            f"{max(rates):g}. Leave out what sets others, such as learning_rate_mapping."
        )
    if unknown := set(group) - {"params", "param_names", "weight_decay", "lr", "initial_lr"}:
        raise ValueError(
            f"a group of parameters has {', '.join(sorted(unknown))}; of a Trainer's groups only "
            "weight_decay can differ. Pass options in optim_args."
        )


def _choose_learning_rate(args: Any, method: str, step_size: str) -> None:
    """Replaces a default that nobody chose where it would only be the upper bound of another rule.

    The default of a class of arguments was made for its default optimizer. If that is one of ours, or if
    DeepSpeed's config has a schedule, the learning rate was chosen.
    """
    default, ours = _default(args, "learning_rate"), default_learning_rate(step_size)
    was_chosen = args.learning_rate != default or _name(_default(args, "optim")) in all_names()
    if ours is None or was_chosen or schedules_learning_rate():
        return
    args.learning_rate = ours  # scheduler, logs and training_args.bin follow
    if args.process_index == 0:
        logger.warning(
            "learning_rate was left at its default, %g, which is not meant for %s: with step_size=%s it is "
            "only an upper bound of the step size, and %.1f is used. To bound the steps at %g after all, "
            "pass a value beside the default, such as %.5g.",
            default,
            method,
            step_size,
            ours,
            default,
            1.0001 * default,
        )


def _handle(context: OptimizerContext) -> tuple[type[NonEuclideanDescent], dict[str, Any]]:
    """Called by the registry. It returns a class, because other libraries extend a factory's keys."""
    name, args = _name(context.args.optim), context.args
    model = _MODELS.get(id(args)) if context.model is None else context.model
    if model is None:
        raise ValueError(
            f"optim={name!r} needs the model, in order to tell matrices from vectors. Call "
            "get_optimizer_cls_and_kwargs(args, model), or pass optimizers=(hf_noneuclid.create_optimizer("
            f"model, {name!r}, lr=...), None) to the Trainer."
        )
    values = _MIXED_IN.get()
    values = parse_options(context.optim_args) if values is None else values
    return NonEuclideanDescent, _make_optimizer_arguments(name, args, model, values)


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
    OptimizerNames._missing_ = classmethod(_refuse_name)
    if NonEuclidCallback not in hf_trainer.DEFAULT_CALLBACKS:
        # It comes first, so that other callbacks report what it adds to the logs.
        hf_trainer.DEFAULT_CALLBACKS.insert(0, NonEuclidCallback)


def _refuse_name(cls: type[OptimizerNames], value: object) -> NoReturn:
    """Names what is near a name that OptimizerNames lacks. Its own message lists all, hyphenated ones too."""
    ours = [name for name in all_names() if "-" not in name]
    theirs = [name for name in cls._value2member_map_ if name not in all_names()]
    near = difflib.get_close_matches(str(value).replace("-", "_"), [*ours, *theirs])
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Those of transformers: {', '.join(theirs)}."
    raise ValueError(
        f"{value!r} is not an optimizer of the Trainer. Those of hf_noneuclid: {', '.join(METHODS)}, "
        f"{FREE_METHOD}. {hint}"
    )


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
    """Makes a Trainer use a method of this package, and observes no accelerator but its own.

    It stands before the class of the Trainer: ``class MyTrainer(NonEuclidTrainerMixin, SFTTrainer)``. If
    ``args.optim`` names one of our methods, this method is used, with ``args.optim_args``; otherwise the
    two attributes below are used. The accelerator is observed only if the step size needs Momo.

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
        if (ours := find_optimizer(optimizer)) is not None and has_momo(ours):
            observe(self.accelerator)
            _FED_ALONE.add(ours)
        return optimizer

    @contextmanager
    def _asking_for(self, method: str, values: dict[str, Any]) -> Iterator[None]:
        """Asks by name in the Trainer's own way, because a subclass may add parameters of its own."""
        asked, self.args.optim = self.args.optim, OptimizerNames(method)
        token = _MIXED_IN.set(values)
        try:
            yield
        finally:
            _MIXED_IN.reset(token)
            self.args.optim = asked

    def _method_and_options(self) -> tuple[str, dict[str, Any]]:
        asked, default = (_name(optim) for optim in (self.args.optim, _default(self.args, "optim")))
        _check_optim_args(self.args.optim_args)
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


def _default(args: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(args) if field.name == name)


class NonEuclidTrainer(NonEuclidTrainerMixin, Trainer):
    """The Trainer, with the optimizers of this package."""
