"""What Momo has to know and only the accelerator sees: the loss of every backward, and how it clips.

``Accelerator.backward`` and the two methods that clip gradients are observed, for all accelerators or for
one. Every loss passes through the first once, whatever a subclass of the Trainer does. DeepSpeed clips inside
its own step, just before it takes ours, which then asks it for the norm. An optimizer without Momo is told
nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from .optimizer import NonEuclideanDescent

logger = logging.getLogger(__name__)

_NORM_EPS = 1e-6
"""What torch and DeepSpeed add to the norm."""


def find_optimizer(optimizer: Any) -> NonEuclideanDescent | None:
    """The NonEuclideanDescent inside the wrappers of accelerate and DeepSpeed, if there is one."""
    while optimizer is not None and not isinstance(optimizer, NonEuclideanDescent):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def has_momo(optimizer: NonEuclideanDescent) -> bool:
    """Whether a model of the loss is a part of what bounds its step size."""
    return "momo" in str(optimizer.param_groups[0]["step_size"])


class _Observer:
    """Passes losses and clipping to the optimizers of an accelerator that have Momo.

    Losses add up as their gradients do: the first backward after a window of accumulation begins anew if it
    finds no gradient. So every backward between two steps counts, and the loss of a step that a loss scaler
    skipped does not, where gradients are then set to None.
    """

    def __init__(self) -> None:
        self._window_is_over: WeakKeyDictionary[Accelerator, bool] = WeakKeyDictionary()
        """Whether the last backward ended one. FSDP2 shows no gradient before that."""
        self._factors: WeakKeyDictionary[NonEuclideanDescent, Tensor | float] = WeakKeyDictionary()
        self._warned: WeakSet[NonEuclideanDescent] = WeakSet()
        self.knows_clipping: WeakSet[NonEuclideanDescent] = WeakSet()
        """The optimizers whose gradients were seen when they were clipped."""

    def observe_loss(self, accelerator: Accelerator, loss: Tensor, **kwargs: Any) -> None:
        share = loss.detach() / _accumulation_divisor(accelerator, **kwargs)
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        for wrapped, ours in _with_momo(accelerator):
            is_over = self._window_is_over.get(accelerator, True)
            # DeepSpeed shows none at all, and steps in the backward that ends a window.
            ours.observe_loss(share, begin=is_over and (is_deepspeed or not _has_gradient(ours)))
            self._factors.pop(ours, None)
            ours.observe_clipping(1.0)  # not that of a step which a loss scaler skipped
            if is_deepspeed:
                self._ask_deepspeed(wrapped.optimizer, ours, accelerator)
        self._window_is_over[accelerator] = accelerator.sync_gradients

    def _ask_deepspeed(self, engine_optimizer: Any, ours: NonEuclideanDescent, accelerator: Any) -> None:
        if hasattr(engine_optimizer, "_global_grad_norm"):
            ours.observe_clipping(functools.partial(_clipping_of_zero, engine_optimizer))
            self.knows_clipping.add(ours)
        elif accelerator.deepspeed_engine_wrapped.engine.gradient_clipping() > 0:
            self.warn(ours, "DeepSpeed clips gradients without ZeRO", "set the stage of ZeRO to 1, 2 or 3")

    def observe_norm(
        self, accelerator: Accelerator, parameters: list[Tensor], norm: Any, max_norm: float
    ) -> None:
        """Notes that the gradients of these parameters, of this norm, were clipped to the largest norm."""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # nothing was clipped, and the step was taken before
        for _, ours in _with_momo(accelerator):
            share = _share(ours, parameters)
            if share == 1:
                # Under FSDP2 the norm is a DTensor; all ranks are here.
                whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                self._factors[ours] = self._factors.get(ours, 1.0) * clipping(whole, max_norm)
                ours.observe_clipping(self._factors[ours])
                self.knows_clipping.add(ours)
            elif share > 0:
                self.warn(ours, "only a part of the gradients was clipped", "clip all of them at once")

    def observe_values(self, accelerator: Accelerator, parameters: list[Tensor]) -> None:
        """Notes that the entries of these gradients were clipped one by one."""
        for _, ours in _with_momo(accelerator):
            if _share(ours, parameters) > 0:
                self.warn(ours, "clip_grad_value_ clips single entries of gradients", "use clip_grad_norm_")

    def warn(self, optimizer: NonEuclideanDescent, what: str, remedy: str) -> None:
        """Warns, once for an optimizer, that Momo cannot know by how much gradients were clipped."""
        if optimizer not in self._warned:
            self._warned.add(optimizer)
            logger.warning(
                "%s, and Momo does not know by how much: the more is clipped, the longer are the steps that "
                "it should truncate. To mend this, %s; or call observe_clipping(factor) before each step; or "
                "use a step_size without momo.",
                what,
                remedy,
            )


def clipping(norm: Tensor | float, max_norm: float) -> Tensor | float:
    """By what gradients of this norm are multiplied when they are clipped, as torch and DeepSpeed do it."""
    factor = max_norm / (norm + _NORM_EPS)
    return factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(1.0, factor)


def _clipping_of_zero(engine_optimizer: Any) -> Tensor | float:
    """The same for DeepSpeed's optimizer, asked in its step: the norm is known, and gradients are clipped."""
    norm, max_norm = engine_optimizer._global_grad_norm, engine_optimizer.clip_grad
    return clipping(norm, max_norm) if max_norm > 0 and norm is not None else 1.0


def _with_momo(accelerator: Accelerator) -> Iterator[tuple[Any, NonEuclideanDescent]]:
    """The optimizers of an accelerator that have Momo, each with accelerate's wrapper."""
    for wrapped in accelerator._optimizers:
        ours = find_optimizer(wrapped)
        if ours is not None and has_momo(ours):
            yield wrapped, ours


def _has_gradient(optimizer: NonEuclideanDescent) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _share(optimizer: NonEuclideanDescent, parameters: list[Tensor]) -> float:
    """The part of the optimizer's gradients that belongs to these parameters."""
    these = set(map(id, parameters))
    its = [id(p) in these for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return sum(its) / max(1, len(its))


def _accumulation_divisor(accelerator: Accelerator, scale_wrt_gas: bool = True, **_: Any) -> int:
    """The number by which ``backward`` divides the loss. The Trainer divides before, and sets it to 1."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return int(accelerator.gradient_accumulation_steps)
    engine = accelerator.deepspeed_engine_wrapped.engine
    return int(engine.gradient_accumulation_steps()) if scale_wrt_gas else 1


# ---------------------------------------------------------------- the accelerator's methods

OBSERVER = _Observer()
_OBSERVED_ALONE: WeakSet[Accelerator] = WeakSet()
"""Accelerators that are observed by themselves."""

Plain = Callable[..., Any]


def _backward(plain: Plain, accelerator: Accelerator, loss: Tensor, **kwargs: Any) -> None:
    # Before the backward, because DeepSpeed takes the step inside it.
    OBSERVER.observe_loss(accelerator, loss, **kwargs)
    plain(loss, **kwargs)


def _clip_grad_norm(
    plain: Plain,
    accelerator: Accelerator,
    parameters: Iterable[Tensor],
    max_norm: float,
    *args: Any,
    **kwargs: Any,
) -> Any:
    parameters = _as_list(parameters)
    norm = plain(parameters, max_norm, *args, **kwargs)
    OBSERVER.observe_norm(accelerator, parameters, norm, max_norm)
    return norm


def _clip_grad_value(
    plain: Plain, accelerator: Accelerator, parameters: Iterable[Tensor], *args: Any, **kwargs: Any
) -> None:
    parameters = _as_list(parameters)
    plain(parameters, *args, **kwargs)
    OBSERVER.observe_values(accelerator, parameters)


def _as_list(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


OBSERVED: dict[str, Callable[..., Any]] = {
    "backward": _backward,
    "clip_grad_norm_": _clip_grad_norm,
    "clip_grad_value_": _clip_grad_value,
}
"""The methods of an Accelerator that are observed, by name."""


def observe_all_accelerators() -> None:
    """Observes loss and clipping of every accelerator in this process. May be called again."""
    for name, observed in OBSERVED.items():
        plain = getattr(Accelerator, name)
        if not getattr(plain, "is_observed", False):
            setattr(Accelerator, name, _of_class(plain, observed))


def _of_class(plain: Plain, observed: Callable[..., Any]) -> Plain:
    @functools.wraps(plain)
    def method(accelerator: Accelerator, *args: Any, **kwargs: Any) -> Any:
        if accelerator in _OBSERVED_ALONE:
            return plain(accelerator, *args, **kwargs)
        return observed(functools.partial(plain, accelerator), accelerator, *args, **kwargs)

    method.is_observed = True  # type: ignore[attr-defined]
    return method


def observe(accelerator: Accelerator) -> None:
    """Tells the optimizers of one accelerator, if they have Momo, every loss and how gradients are clipped.

    A Trainer does it by itself. May be called again; other accelerators are left alone.

    Args:
        accelerator: Whose ``backward``, ``clip_grad_norm_`` and ``clip_grad_value_`` are observed. Every loss
            between two steps counts, also under gradient accumulation. Of several optimizers, each steps
            after its own backward.

    Example:
        >>> import torch, hf_noneuclid
        >>> from accelerate import Accelerator
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(4, 2)
        >>> optimizer = hf_noneuclid.create_optimizer(model, "muonmax_momo", lr=1.0)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> hf_noneuclid.observe(accelerator)
        >>> accelerator.backward(model(torch.ones(2, 4)).square().mean())
        >>> optimizer.step()
    """
    if accelerator in _OBSERVED_ALONE:
        return
    for name, observed in OBSERVED.items():
        plain = getattr(accelerator, name)
        method = functools.partial(observed, plain, accelerator)
        setattr(accelerator, name, functools.update_wrapper(method, plain))
    _OBSERVED_ALONE.add(accelerator)
