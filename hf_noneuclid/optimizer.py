"""The optimizer. A step reads as its phases: check, accumulate, measure, decide, apply.

``reference.py`` has the same algorithm on one device in the symbols of the paper; read it first.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import groups as parameter_groups
from . import options as known_options
from .buckets import Motion
from .diagnostics import Diagnostics, StepRecord
from .elementwise import Tensors, as_scalar
from .momo import believed_bound, model_height, truncated_step_size
from .nuclear_norms import Measured
from .options import Options
from .plan import Plan, make_plan
from .slope import Pace, Reading, advance

Loss = Tensor | float
Clipping = Tensor | float | Callable[[], Tensor | float]

_NOT_PLANNED = dict.fromkeys(("params", "lr", "initial_lr", "momentum", "beta2"))
"""Keys of a group that the plan does not depend on; ``{**group, **_NOT_PLANNED}`` blanks them out."""

_requires_grad = operator.attrgetter("requires_grad")


class Checked(NamedTuple):
    """Phase 0: the gradients, and whether this step may be taken at all."""

    grads: Sequence[Tensors]
    """This rank's gradients, for each bucket."""
    ok: Tensor
    loss: Tensor | None
    """f, the mean over the ranks."""
    inner: Tensor
    """Σ⟨p, g⟩; 0 without Momo."""
    slopes: Tensor
    """⟨g, u⟩ with the last step u, and ‖g‖², over matrices and over vectors, of shape (4,); 0 without the
    slope."""


class DualNorms(NamedTuple):
    """Phase 2: what the momenta amount to."""

    measured: list[Measured]
    """For each bucket of matrices and vectors."""
    norms: Tensor
    """d of every unit, before it is scaled, of shape (units,)."""
    inner: Tensor
    """Σ⟨p, m⟩; 0 without Momo."""


class StepSize(NamedTuple):
    """How far a step goes, what bounds it, and what is to be remembered for the next one."""

    tau: Tensor
    """τ of the matrices and of the vectors, of shape (2,); they differ by the slope alone."""
    is_limited: Tensor
    """Whether the learning rate bounds it."""
    is_truncated: Tensor
    """Whether Momo does."""
    lower_bound: Tensor | None
    """F*; None without Momo."""
    learned: dict[str, Tensor]
    """What ``Plan.shared`` will hold."""


class Decided(NamedTuple):
    """Phase 3: how far every unit moves."""

    ok: Tensor
    step_size: StepSize
    dual: Tensor
    """D."""
    coefficients: Tensor
    """What multiplies the direction of every unit; 0 if nothing may move."""
    per_length: Tensor
    """The same without its sign and per unit of the step's length."""
    decay_rates: Tensor
    """τ or η for the matrices and for the vectors, of shape (2,); 0 if nothing may move."""


class NonEuclideanDescent(Optimizer):
    """Steepest descent in a norm of your choice: Muon, Scion, PolarGrad, MuonMax.

    The option ``step_size`` says what bounds a step: the learning rate alone, or also Momo, a model of the
    loss (``hf_noneuclid.momo``), the slope along the last step (``hf_noneuclid.slope``), or both. With Momo
    every loss must be known, and by what gradients are multiplied when they are clipped
    (``observe_clipping``). The slope needs neither. It keeps the last step, in bfloat16.

    ``step`` never waits for the device. A step with a NaN or infinite loss or gradient changes nothing and
    is counted (``diagnostics``). On several ranks (DDP, FSDP2, HSDP, DeepSpeed ZeRO, found at the first
    step) all ranks take the step that one process would take, and share the work.

    Args:
        params: Parameters, or groups of them, ``{"params": [...], "norm": ...}``. A group may set the
            options of ``hf_noneuclid.options.ParameterOptions``, each as one value or as a list with an entry
            for each parameter. Named parameters are accepted.
        lr: Learning rate η, one for all groups. With the slope it is only the largest length of a step, and
            1 is the convention; its schedule multiplies the length from its peak on.
        route: Called with ``params``; returns groups that have a norm. For Trainers, whose groups have none.
        **options: ``descent`` and ``product_norm``, and any other option of ``hf_noneuclid.options.Options``;
            ``help(Options)`` lists them with their ranges and defaults.

    Raises:
        ValueError: An option is out of range, or differs between groups where it must not.
        TypeError: An option is unknown or missing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> vectors = [p for p in model.parameters() if p.ndim == 1]
        >>> optimizer = NonEuclideanDescent(
        ...     [{"params": matrices, "norm": "spectral"}, {"params": vectors, "norm": "ada_l2"}],
        ...     lr=1.0, descent="regularized", product_norm="hybrid", step_size="momo+slope",
        ... )
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> _ = optimizer.step(loss=loss)

    References:
        M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon
        and its Many Variants", arXiv 2510.09827, 2025. Its method has ``step_size="momo"`` or ``"rate"``,
        and ``decay_at="rate"``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        route: Callable[[Iterable[Any]], list[dict[str, Any]]] | None = None,
        **options: Any,
    ) -> None:
        known = known_options.fields(Options)
        for name in options.keys() - known:
            raise TypeError(f"unknown option {name!r}; known are {', '.join(known)}.")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in options:
                raise TypeError(f"{name} is missing; it must be {field.metadata['rule'].words}.")
        known_options.check_value("lr", lr, known_options.LEARNING_RATE)
        known_options.check(options, [Options])
        chosen = Options(**options)
        defaults = {name: getattr(chosen, name) for name in known}
        self._given: list[list[weakref.ref[Tensor]]] = []  # engines replace what stands in the groups
        self._forget()
        params = params if route is None else route(params)
        super().__init__(params, {**parameter_groups.PARAMETER_DEFAULTS, **defaults, "lr": lr})

    def _forget(self) -> None:
        """Forgets what is derived from groups and state; the next step derives it again."""
        self._observed: Loss | None = None
        self._clipping: Clipping = 1.0
        self._plan: Plan | None = None
        self._plan_key: list[Any] = []
        self._diagnostics = Diagnostics(resumed=bool(getattr(self, "state", None)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_given"):  # a copy, or unpickled
            self._given = [_references(group) for group in self.param_groups]
            for name, field in known_options.fields(Options).items():
                for group in (self.defaults, *self.param_groups):
                    group.setdefault(name, field.default)  # an option that is newer than the pickle
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after checking its options against the others'."""
        parameter_groups.check_group(param_group, self.defaults, len(self.param_groups))
        super().add_param_group(param_group)
        parameter_groups.check_parameters(self.param_groups[-1])
        parameter_groups.check_views(self.param_groups)
        self._given.append(_references(self.param_groups[-1]))

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss] | None = None, *, loss: Loss | None = None
    ) -> Loss | None:
        """Takes one step.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss. If losses were observed,
                in it or before, they count instead of what it returns.
            loss: The loss that produced the gradients. Needed with Momo, unless ``observe_loss`` was called.

        Returns:
            The loss that was used, or None.

        Raises:
            ValueError: A closure together with a loss, or different learning rates in the groups.
            RuntimeError: Momo is on and no loss is known, a gradient is sparse, or, at the first step, the
                parameters are sharded in a way that is not supported or differ between ranks.
        """
        loss, clipping = self._take_loss(closure, loss)
        lr = self._learning_rate()
        # torch prepares an optimizer for a sharded load by a step with zero gradients, no loss and η = 0.
        is_preparation = not self.state and lr == 0 and loss is None
        momo = "momo" in self.param_groups[0]["step_size"]
        if momo and loss is None and not is_preparation:
            raise RuntimeError(
                "Momo needs the loss of every step, and none was observed. Call step(loss=loss), or "
                "observe_loss(loss) before step(), or hf_noneuclid.observe(accelerator) once, or train with "
                "the Trainer; or use a step_size without momo."
            )
        plan = self._current_plan()
        if is_preparation and momo:
            return None  # the state exists now, and no gradient was seen
        if not (plan.eta.is_cuda and torch.cuda.is_current_stream_capturing()):
            plan.eta.fill_(lr)  # a CUDA graph would fill in the same number at every replay

        checked = self._check(plan, loss, must_move=is_preparation)
        self._accumulate(plan, checked, as_scalar(clipping, plan.like))
        dual = self._measure(plan, checked)
        decided = self._decide(plan, checked, dual)
        self._apply(plan, dual, decided)
        self._report(plan, lr, checked, dual, decided)
        return loss

    def _check(self, plan: Plan, loss: Loss | None, must_move: bool) -> Checked:
        """Phase 0: f, Σ⟨p, g⟩ and every gradient finite? Nothing is written before this is known."""
        grads, largest_entries = [], []
        for bucket in plan.buckets:
            grads.append(bucket.gradients())
            largest_entries.append(bucket.largest(grads[-1]))
        largest = torch.cat(largest_entries)
        # NaN fails every comparison, so that it counts as bad, too.
        bad = (largest <= plan.gradient_limits).logical_not().sum().to(largest.dtype)
        inner, slopes = _inner(plan, grads), _slopes(plan, grads)
        share = as_scalar(0.0 if loss is None else loss, plan.like) / plan.ranks
        # All that the ranks must agree on before anything is written, in one all-reduce.
        facts = _sum_over_ranks(plan, torch.cat([torch.stack([bad, largest.sum(), inner, share]), slopes]))
        bad, movement, inner, mean_loss = facts[:4].unbind()
        ok = (bad == 0) & inner.isfinite() & mean_loss.isfinite()
        if must_move:  # without Momo a preparation is known from a first step at η = 0 only by its gradients
            ok = ok & (movement > 0)
        return Checked(grads, ok, None if loss is None else mean_loss, inner, facts[4:])

    def _accumulate(self, plan: Plan, checked: Checked, clipping: Tensor) -> None:
        """Phase 1: m and v from g, f̄ from f - Σ⟨p, g⟩, each starting at its first good value."""
        momentum, beta2 = self.param_groups[0]["momentum"], self.param_groups[0]["beta2"]
        weights = []
        for step in plan.steps:
            # 1 at the first good step, 1 - β after it, 0 at a bad one.
            of_m, of_v = (1 - step).clamp(min=1 - momentum), (1 - step).clamp(min=1 - beta2)
            weights.append((of_m * checked.ok, of_v * checked.ok))
            step.add_(checked.ok)
        for bucket, grads in zip(plan.buckets, checked.grads, strict=True):
            bucket.accumulate(grads, checked.ok, *weights[bucket.cohort])
        if checked.loss is not None and plan.momo:  # then all parameters are in one cohort
            linear = {"running_loss": clipping * checked.loss - checked.inner, "running_weight": clipping}
            for key, value in linear.items():
                plan.shared[key].add_(torch.where(checked.ok, value - plan.shared[key], 0) * weights[0][0])

    def _measure(self, plan: Plan, checked: Checked) -> DualNorms:
        """Phase 2: the dual norm d of every unit, and Σ⟨p, m⟩."""
        # The buckets that move are the first ones. The others are frozen, and are not measured.
        measured = [bucket.measure(g) for bucket, g in zip(plan.moving, checked.grads, strict=False)]
        inner = _inner(plan, [bucket.momenta() for bucket in plan.buckets] if plan.momo else [])
        summed = _sum_over_ranks(plan, torch.cat([*[x.partial for x in measured], inner.reshape(1)]))
        by_bucket = torch.split(summed[:-1], plan.units)
        norms = [bucket.norm.dual(x) for bucket, x in zip(plan.moving, by_bucket, strict=True)]
        return DualNorms(measured, torch.cat(norms), summed[-1])

    def _decide(self, plan: Plan, checked: Checked, dual: DualNorms) -> Decided:
        """Phase 3: D, the shares c, τ, and what multiplies the direction of every unit."""
        d = dual.norms * plan.scales
        n = plan.matrix_units
        D, matrix_shares, vector_shares = plan.product_norm.compose(d[:n], d[n:])
        shares = torch.cat([matrix_shares, vector_shares])
        shared_d = shares * d
        duals = torch.stack([shared_d[:n].sum(), shared_d[n:].sum()])
        unit = D if plan.options.descent == "regularized" else torch.ones_like(D)
        chosen = self._step_size(plan, checked, dual.inner, D, duals, unit)
        # Momenta are finite here, but sums of large ones may not be: then nothing moves, and the step is bad.
        ok = checked.ok & D.isfinite() & chosen.tau.isfinite().all()
        # s counts once in d (for the share and D) and once more in the direction.
        per_length = torch.where(ok, shares * plan.scales, 0)
        lengths = torch.where(ok, chosen.tau * unit, 0)
        decay_rates = chosen.tau if plan.options.decay_at == "step" else plan.eta.expand(2)
        return Decided(
            ok,
            chosen,
            D,
            coefficients=-lengths[plan.parts] * per_length,
            per_length=per_length,
            decay_rates=torch.where(ok, decay_rates, 0),
        )

    def _step_size(
        self, plan: Plan, checked: Checked, inner: Tensor, D: Tensor, duals: Tensor, unit: Tensor
    ) -> StepSize:
        """τ: the smallest of the learning rate and of what the slope and Momo allow."""
        options, shared = plan.options, plan.shared
        # By the slope η bounds the length, which does not depend on the size of the gradients.
        limit = torch.where(D == 0, 0, plan.eta / unit if plan.slope else plan.eta)
        tau, bound, is_truncated = limit, None, torch.zeros_like(checked.ok)
        learned: dict[str, Tensor] = {}
        if checked.loss is not None and plan.momo:
            if plan.slope:  # then a number that proves wrong need not stop the training
                bound = believed_bound(shared["lower_bound_memory"][0], checked.loss)
                learned["lower_bound_memory"] = bound.reshape(1)
            else:
                bound = torch.full_like(D, options.loss_lower_bound)
            height = model_height(shared["running_loss"], inner, shared["running_weight"], bound)
            tau = truncated_step_size(limit, height, D, options.descent)
            is_truncated = tau < limit
        if plan.slope:
            reading = Reading(checked.slopes[:2], checked.slopes[2:].sqrt(), duals, plan.eta, tau * unit)
            pace, lengths = advance(
                Pace(*shared["pace"].view(-1, 2)),
                reading,
                momentum=self.param_groups[0]["momentum"],
                first_step=options.first_step,
                regularized=options.descent == "regularized",
            )
            learned["pace"] = torch.cat(pace)
            is_truncated = is_truncated & (lengths == reading.limit).any()
            tau = torch.where(D == 0, 0, lengths / unit)
        tau = tau.expand(2)
        # The slope reaches η up to the rounding of a logarithm.
        is_limited = ((tau >= (1 - 1e-5) * limit) & (tau > 0)).any()
        return StepSize(tau, is_limited, is_truncated, bound, learned)

    def _apply(self, plan: Plan, dual: DualNorms, decided: Decided) -> None:
        """Phase 4: p ← (1 - τλ) p + coefficient u. What was learned for the next step is kept."""
        by_unit = torch.stack([dual.norms, decided.coefficients, decided.per_length])
        by_bucket = torch.split(by_unit, plan.units, dim=1)
        nuclear_norms = []
        for i, bucket in enumerate(plan.moving):
            d, coefficients, per_length = by_bucket[i].unbind()
            motion = Motion(coefficients, per_length, decided.decay_rates[bucket.part], decided.ok)
            # Popped, so that the polar factors are freed bucket by bucket.
            norms = bucket.apply(dual.measured.pop(0), d, motion)
            nuclear_norms += [] if norms is None else [norms]  # vectors have none
        if plan.stale_norms:
            fresh = _sum_over_ranks(plan, torch.cat(nuclear_norms))
            kept = torch.where(decided.ok, fresh, torch.cat(plan.stale_norms))
            torch._foreach_copy_(plan.stale_norms, torch.split(kept, [len(x) for x in plan.stale_norms]))
        for key, value in decided.step_size.learned.items():
            plan.shared[key].copy_(torch.where(decided.ok, value, plan.shared[key]))

    # ---------------------------------------------------------------- the loss

    def observe_loss(self, loss: Loss, *, begin: bool = False) -> None:
        """Notes the loss whose gradients the next ``step`` will use, where it cannot be passed to ``step``.

        What is observed adds up until a step is taken: under gradient accumulation, observe the share of
        each micro-batch.

        Args:
            loss: Python number or tensor of one element. Under DDP, this rank's: ``step`` takes the mean.
            begin: A new accumulation window begins: drop what was observed before, because a loss scaler
                may have skipped its step.
        """
        if isinstance(loss, Tensor):
            loss = loss.detach()
        self._observed = loss if begin or self._observed is None else self._observed + loss

    def observe_clipping(self, factor: Clipping) -> None:
        """Notes by what the gradients of the next ``step`` were multiplied when they were clipped.

        Momo needs it: a clipped gradient belongs to a loss that is smaller by the same factor. Without it,
        truncated steps are longer by 1 / factor.

        Args:
            factor: In (0, 1]; a Python number, a tensor of one element, or a function that returns one and
                is called in ``step``.
        """
        self._clipping = factor

    def _take_loss(
        self, closure: Callable[[], Loss] | None, loss: Loss | None
    ) -> tuple[Loss | None, Tensor | float]:
        """The loss of this step, and by what its gradients were multiplied; both are used up."""
        if closure is not None:
            if loss is not None:
                raise ValueError(
                    "step() got both a closure and a loss. Pass one: the closure returns the loss."
                )
            with torch.enable_grad():
                loss = closure()
        observed, self._observed = self._observed, None
        clipping, self._clipping = self._clipping, 1.0
        # A closure may be the last of several micro-batches; what was observed holds them all.
        loss = loss if observed is None or (loss is not None and closure is None) else observed
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)}; step() needs one number, such as its mean."
            )
        return loss, clipping() if callable(clipping) else clipping

    # ---------------------------------------------------------------- the learning rate and the plan

    def _learning_rate(self) -> float:
        lr = float(self.param_groups[0]["lr"])
        for group in self.param_groups:
            if group["lr"] != lr:
                rates = sorted({float(group["lr"]) for group in self.param_groups})
                raise ValueError(
                    f"the groups have different learning rates, {rates}; there is one η. Use lr_scale to "
                    "scale a group's steps."
                )
        return lr

    def update_lr(self) -> None:
        """Hands the learning rate of the groups to a step that was captured in a CUDA graph.

        Call it before each replay. A step that is not replayed does it by itself.
        """
        lr = self._learning_rate()
        if self._plan is not None:
            self._plan.eta.fill_(lr)
        self._diagnostics.renew_lr(lr)

    def _current_plan(self) -> Plan:
        """The plan, made anew if parameters, their options or the tensors of the state are others."""
        if self._plan is None or self._key_of_plan() != self._plan_key:
            given = [[reference() for reference in references] for references in self._given]
            before, self._plan = self._plan, None
            self._plan = make_plan(self.param_groups, given, self.state)
            if before is not None:
                self._plan.grid.sent.update(before.grid.sent)
            self._plan_key = self._key_of_plan()  # not before: the plan makes the state
        return self._plan

    def _key_of_plan(self) -> list[Any]:
        """What the plan was made from. It refers to tensors of the state, which offloading replaces."""
        key: list[Any] = []
        for group in self.param_groups:
            params = group["params"]
            key += [{**group, **_NOT_PLANNED}, *map(id, params), *map(_requires_grad, params)]
        for its in self.state.values():
            key += map(id, its.values())
        return key

    # ---------------------------------------------------------------- what the user sees

    def _report(self, plan: Plan, lr: float, checked: Checked, dual: DualNorms, decided: Decided) -> None:
        record = StepRecord(
            lr=lr,
            step_sizes=torch.where(decided.ok, decided.step_size.tau, 0),
            truncated=decided.step_size.is_truncated,
            limited=decided.step_size.is_limited,
            dual_norm=decided.dual,
            loss=checked.loss,
            running_loss=plan.shared["running_loss"].clone() if plan.momo else None,
            lower_bound=decided.step_size.lower_bound,
            nuclear_norms=dual.norms[: plan.matrix_units],
            matrix_names=plan.matrix_names,
        )
        self._diagnostics.note(record, decided.ok)

    def diagnostics(self) -> dict[str, Any]:
        """What the last step did. Reading waits for the device; steps that nobody reads do not.

        Returns:
            An empty dict before the first step; then ``lr`` η, ``step_size`` τ of the matrices,
            ``vector_step_size`` τ of the vectors (they differ by the slope alone), ``truncated`` (Momo
            bounds the step), ``limited`` (the learning rate does), ``dual_norm`` D, ``loss`` (mean over the
            ranks, None if unknown), ``running_loss`` f̄ (None without Momo), ``loss_lower_bound`` F* (None
            without Momo, and once a loss was below it if the slope bounds steps, too), ``nuclear_norms`` by
            the matrix's name (as the step used them: exact, stale or Frobenius), and counts since the
            optimizer was made: ``steps``, ``truncated_steps``, ``limited_steps``, ``zero_steps`` (τ was 0),
            ``bad_steps``, ``consecutive_bad_steps``, and ``first_fatal_step``, where the last ten bad steps
            in a row began (0 if that did not happen).
            ``bytes_sent`` is what this rank has sent to others for the steps so far, by collective; empty
            on one device.
        """
        read = self._diagnostics.read()
        return {**read, "bytes_sent": dict(self._plan.grid.sent)} if read and self._plan else {}

    # ---------------------------------------------------------------- checkpoints

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of an optimizer of the same method.

        Unlike torch's own, it leaves the dtype of the state as it was saved: float32 for bfloat16
        parameters. Options that differ are taken from the checkpoint, with a warning.

        Raises:
            ValueError: The checkpoint is of another method, or its groups or parameters do not fit.
        """
        parameter_groups.check_checkpoint(self.param_groups, state_dict["param_groups"])
        # torch takes the saved groups. Options that the checkpoint is too old to have stay as they are.
        saved_groups = [
            {**{name: value for name, value in ours.items() if name != "param_names"}, **saved}
            for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ] + state_dict["param_groups"][len(self.param_groups) :]
        state_dict = {**state_dict, "param_groups": saved_groups}
        params = [param for group in self.param_groups for param in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved_states = [state_dict["state"].get(i, {}) for i in saved_ids]
        for param, saved in zip(params, saved_states, strict=False):
            parameter_groups.check_momentum(param, saved.get("momentum"))
        super().load_state_dict(state_dict)
        # torch casts the state to the dtype of the parameters; momentum in bfloat16 would not resume exactly.
        for param, saved in zip(params, saved_states, strict=True):
            for key, value in saved.items():
                self.state[param][key] = value.detach().to(param.device, copy=True)


# The options are keywords of the constructor, and show as such in help() and to tools that ask for them.
NonEuclideanDescent.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(NonEuclideanDescent.__init__).parameters.values())[1:3],
        *inspect.signature(Options).parameters.values(),
    ]
)


def _sum_over_ranks(plan: Plan, x: Tensor) -> Tensor:
    return x if plan.ranks == 1 else plan.grid.sum(x)


def _inner(plan: Plan, xs: Sequence[Tensors]) -> Tensor:
    """This rank's part of Σ⟨p, x⟩, which Momo needs. Replicas hold the same, so that only one counts."""
    total = plan.like
    if plan.momo and plan.grid.replica == 0:
        for bucket, x in zip(plan.buckets, xs, strict=True):
            total = total + bucket.inner(x)
    return total


def _slopes(plan: Plan, grads: Sequence[Tensors]) -> Tensor:
    """This rank's part of ⟨g, u⟩ and of ‖g‖², over matrices and over vectors; 0 without the slope."""
    facts = plan.like.new_zeros(2, 2)
    if plan.slope and plan.grid.replica == 0:
        for bucket, g in zip(plan.moving, grads, strict=False):
            facts[:, bucket.part] += bucket.slope(g)
    return facts.flatten()


def _references(group: dict[str, Any]) -> list[weakref.ref[Tensor]]:
    """Weak references to the parameters of a group: FSDP2 lets go of the ones that it replaces."""
    return [weakref.ref(param) for param in group["params"]]
