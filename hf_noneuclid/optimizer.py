"""Non-Euclidean gradient descent: the optimizer, whose step reads as its four phases."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import options
from .diagnostics import Diagnostics, StepRecord
from .elementwise import MIB, largest_entries
from .geometry import Geometry
from .history import History
from .layouts import bind
from .layouts.pieces import make_pieces
from .layouts.plan import Plan, make_plan
from .momo import BoundRule, Descent, Seen, lower_bound, model_decrease, model_value, truncated_step_size
from .phases import Checked, Decided, Measured
from .polar import PolarMethod
from .product_norms import ProductNormName, product_norm

Loss = Tensor | float


class NonEuclideanDescent(Optimizer):
    """Steepest descent in a norm of your choice: Muon, Scion, PolarGrad, MuonMax, with or without Momo.

    ``step`` never waits for the device. A step with a NaN or infinite loss or gradient changes nothing and
    is counted (``diagnostics``). On several ranks (DDP, FSDP2, HSDP, DeepSpeed ZeRO, known at the first
    step) all take the step that one process would, and share the work.

    Args:
        params: Parameters, or groups of them, ``{"params": [...], "norm": ...}`` with ``norm`` one of
            ``spectral`` (2-D: a matrix, 3-D: a stack of matrices, more or with ``flatten=True``: one matrix
            of shape[0] rows), ``linf``, ``ada_linf``, ``ada_l2``. A group may set its own
            ``weight_decay``, ``lr_scale`` and ``spectral_scale``; each of these and ``norm`` and
            ``flatten`` may also be a list with an entry for each parameter. Named parameters are accepted.
        lr: Learning rate η, one for all groups.
        descent: ``constrained`` (p ← p - τ c u) or ``regularized`` (p ← p - τ D c u).
        product_norm: ``linf``, ``l2`` or ``hybrid``.
        momo: Truncate the step size by a model of the loss; needs the loss at every step.
        loss_lower_bound: F*, a lower bound of the loss, in its units; or a rule that finds one: ``auto``,
            ``relative`` or ``star`` (see ``momo``). Momo only.
        lower_bound_fraction: Of ``auto`` and ``relative``: F* in parts of a running mean of the loss.
        lower_bound_horizon: Steps over which that mean forgets.
        lower_bound_slack: Of ``auto``: F* is at least this far below that mean, in units of the loss.
        momentum: β, of the momentum and of the running loss.
        beta2: β₂, of the second moment.
        eps: ε in a = ε + √v.
        weight_decay: Decoupled weight decay λ: p ← (1 - ηλ) p.
        spectral_scale: s; the spectral norm is divided by it.
        polar_method: ``polar_express``, ``newton_schulz`` or ``svd``.
        polar_steps: Iterations of the first two.
        nuclear_norm: ``exact``; ``stale``, each matrix's of the step before; or ``frobenius``, ‖m‖_F instead.
        reuse_gradients: Keep polar factors where the gradients of their matrices were: an ``exact`` step then
            needs no more memory than a ``stale`` one, and ``p.grad`` is of no use after it. Only for matrices
            whose whole gradient is on the rank that owns them, as on one device, under DDP, and ZeRO-1 and 2.
        workspace: MiB of temporary copies of parameters that a step may make at once; a matrix that is
            larger is worked on alone. On a CPU the copies are smaller still.

    Raises:
        ValueError: An option is out of range or unknown, or differs between groups where it may not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> vectors = [p for p in model.parameters() if p.ndim == 1]
        >>> optimizer = NonEuclideanDescent(
        ...     [{"params": matrices, "norm": "spectral"}, {"params": vectors, "norm": "ada_l2"}],
        ...     lr=1e-2, descent="regularized", product_norm="hybrid", momo=True,
        ... )
        >>> loss = model(torch.ones(2, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)

    References:
        M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon
        and its Many Variants", arXiv 2510.09827, 2025.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        descent: Descent,
        product_norm: ProductNormName,
        momo: bool = False,
        loss_lower_bound: float | BoundRule = 0.0,
        lower_bound_fraction: float = 0.85,
        lower_bound_horizon: float = 10.0,
        lower_bound_slack: float = 0.5,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        spectral_scale: float = 1.0,
        polar_method: PolarMethod = "polar_express",
        polar_steps: int = 5,
        nuclear_norm: options.NuclearNorm = "exact",
        reuse_gradients: bool = False,
        workspace: int = 256,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key in options.OPTIMIZER_OPTIONS}
        options.check(defaults)
        self._given: list[list[weakref.ref[Tensor]]] = []  # engines replace what stands in the groups
        self._reset()
        super().__init__(params, {**defaults, "lr_scale": 1.0, "flatten": False})

    def _reset(self) -> None:
        """Forgets what is derived from groups and state; the next step derives it again."""
        self._observed: Loss | None = None
        self._plan: Plan | None = None
        self._plan_key: list[Any] = []
        self._eta: Tensor | None = None
        self._diagnostics = Diagnostics(resumed=bool(getattr(self, "state", None)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_given"):  # a copy, or unpickled
            self._given = [_references(group) for group in self.param_groups]
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after checking its options against the others'."""
        options.check_group(param_group, self.defaults, len(self.param_groups))
        super().add_param_group(param_group)
        options.check_parameters(self.param_groups[-1])
        options.check_views(self.param_groups)
        self._given.append(_references(self.param_groups[-1]))

    # ---------------------------------------------------------------- the loss

    def observe_loss(self, loss: Loss, *, begin: bool = False) -> None:
        """Notes the loss whose gradients the next ``step`` will use, where it cannot be passed to ``step``.

        What is observed adds up until a step is taken: under gradient accumulation, observe each
        micro-batch's share.

        Args:
            loss: Python number or tensor of one element. Under DDP, this rank's: ``step`` takes the mean.
            begin: A new accumulation window begins, so drop what was observed before (a loss scaler may
                have skipped its step).
        """
        if isinstance(loss, Tensor):
            loss = loss.detach()
        self._observed = loss if begin or self._observed is None else self._observed + loss

    def _take_loss(self, closure: Callable[[], Loss] | None, loss: Loss | None) -> Loss | None:
        if closure is not None:
            if loss is not None:
                raise ValueError(
                    "step() got both a closure and a loss. Pass one: the closure returns the loss."
                )
            with torch.enable_grad():
                loss = closure()
        observed, self._observed = self._observed, None
        loss = observed if loss is None else loss
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)}; step() needs one number, such as its mean."
            )
        return loss

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Loss] | None = None, *, loss: Loss | None = None
    ) -> Loss | None:
        """Takes one step.

        Args:
            closure: Computes the loss and its gradients again, and returns the loss.
            loss: The loss that produced the gradients. Needed with Momo, unless ``observe_loss`` was called.

        Returns:
            The loss that was used, or None.

        Raises:
            ValueError: A closure together with a loss, or different learning rates in the groups.
            RuntimeError: Momo is on and no loss is known, a gradient is sparse, or, at the first step, the
                parameters are sharded in a way that is not supported or differ between ranks.
        """
        loss = self._take_loss(closure, loss)
        lr = options.common_lr(self.param_groups)
        preparing = not self.state and lr == 0 and loss is None
        if self._option("momo") and loss is None and not preparing:
            raise RuntimeError(
                "Momo needs the loss of every step, and none was observed. Call step(loss=loss), or "
                "observe_loss(loss) before step(), or train with the Trainer, which does it; or use the "
                "method without _momo."
            )
        plan = self._current_plan()
        if preparing and self._option("momo"):
            return None  # torch prepares a sharded load this way: state exists now, nothing was seen

        checked = self._check(plan, loss, must_move=preparing)
        self._accumulate(checked)
        measured = self._measure(plan)
        decided = self._decide(plan, self._learning_rate(plan, lr), checked, measured)
        self._apply(plan, decided, measured)
        self._report(plan, lr, checked, measured, decided)
        return loss

    def _check(self, plan: Plan, loss: Loss | None, must_move: bool) -> Checked:
        """Phase 0: f, Σ⟨p, g⟩ and every gradient finite? Nothing is written before this is known."""
        ranks, momo = plan.ranks, self._option("momo")
        grads = [piece.gradient() for piece in plan.here]
        largest = plan.stack(largest_entries(grads))
        bad = (largest <= plan.gradient_limits).logical_not().sum().to(plan.dtype)
        inner = ranks.once(plan.inner(grads)) if momo else plan.scalar(0.0)
        share = plan.scalar(0.0 if loss is None else loss) / ranks.count
        bad, any_gradient, inner, mean_loss = ranks.sum(torch.stack([bad, largest.sum(), inner, share]))
        ok = (bad == 0) & inner.isfinite() & mean_loss.isfinite()
        if must_move:
            ok = ok & (any_gradient > 0)
        return Checked(ok, grads, None if loss is None else mean_loss, inner if momo else None)

    def _accumulate(self, checked: Checked) -> None:
        """Phase 1: m and v from g, f̄ from f - Σ⟨p, g⟩."""
        momentum, beta2 = self._option("momentum"), self._option("beta2")
        self._history.accumulate(checked.grads, checked.ok, momentum=momentum, beta2=beta2)
        if checked.loss is not None and checked.inner is not None:
            self._history.accumulate_loss(checked.loss - checked.inner, checked.ok, momentum=momentum)
        self._history.count(checked.ok)

    def _measure(self, plan: Plan) -> Measured:
        """Phase 2: the dual norms d, and Σ⟨p, m⟩."""
        momo, partials = self._option("momo"), [self._geometry.partial(batch) for batch in plan.batches]
        inner = plan.inner(self._history.momenta(plan.here)) if momo else plan.scalar(0.0)
        summed = plan.ranks.sum(torch.cat([*partials, plan.ranks.once(inner).reshape(1)]))
        sizes = [batch.units for batch in plan.batches]
        by_batch = zip(plan.batches, torch.split(summed[:-1], sizes), strict=True)
        duals = {batch: self._geometry.dual(batch, partial) for batch, partial in by_batch}
        return Measured(duals, summed[-1] if momo else None)

    def _decide(self, plan: Plan, eta: Tensor, checked: Checked, measured: Measured) -> Decided:
        """Phase 3: D, the shares c and τ."""
        d = torch.cat([measured.duals[batch] for batch in plan.batches]) * plan.scales
        n = plan.matrix_units
        product = product_norm(self._option("product_norm")).compose(d[:n], d[n:])
        tau, bound, memory = self._step_size(eta, product.dual, checked.loss, measured.inner)
        ok = checked.ok & product.dual.isfinite() & tau.isfinite()
        shares = torch.cat([product.matrix_shares, product.vector_shares])
        length = tau * product.dual if self._option("descent") == "regularized" else tau
        coefficients = torch.where(ok, -length * shares * plan.scales, 0)
        return Decided(ok, tau, tau < eta, bound, memory, product.dual, eta * ok, coefficients)

    def _step_size(
        self, eta: Tensor, dual: Tensor, loss: Tensor | None, inner: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """τ; with Momo also F*, and what its rule remembers."""
        if loss is None or inner is None:
            return torch.where(dual == 0, 0, eta), None, None
        descent: Descent = self._option("descent")
        rule, memory = self._lower_bound, self._history.bound_memory
        seen = Seen(loss, model_value(self._history.running_loss, inner), eta)
        bound = rule.bound(memory, seen)
        height = rule.part(memory, seen) * (seen.model - bound)
        tau = truncated_step_size(eta, height, dual, descent)
        return tau, bound, rule.remember(memory, seen, model_decrease(tau, dual, descent))

    def _apply(self, plan: Plan, decided: Decided, measured: Measured) -> None:
        """Phase 4: p ← (1 - ηλ) p + coefficient u."""
        coefficients = torch.split(decided.coefficients, [batch.units for batch in plan.batches])
        for batch, coefficient in zip(plan.batches, coefficients, strict=True):
            self._geometry.move(batch, measured.duals[batch], coefficient, decided.decay_rate)
        self._geometry.end_step(decided.ok)
        if decided.bound_memory is not None:
            self._history.keep_bound_memory(decided.bound_memory, decided.ok)

    # ---------------------------------------------------------------- what the phases use

    def _option(self, name: str) -> Any:
        return self.param_groups[0][name]

    def _learning_rate(self, plan: Plan, lr: float) -> Tensor:
        """η on the device, the same tensor in every step; a CUDA graph is not to fill it with one number."""
        if self._eta is None:
            self._eta = plan.scalar(lr)
        elif not _is_captured(plan.device):
            self._eta.fill_(lr)
        return self._eta

    def update_lr(self) -> None:
        """Hands the learning rate of the groups to a step that was captured in a CUDA graph.

        Call it before each replay. A step that is not replayed does it by itself.
        """
        lr = options.common_lr(self.param_groups)
        if self._eta is not None:
            self._eta.fill_(lr)
        self._diagnostics.renew_lr(lr)

    def _current_plan(self) -> Plan:
        """The plan, made anew if parameters were added, frozen or replaced, or their options changed."""
        key = [
            [group[option] for option in options.PARAMETER_OPTIONS]
            + [(id(param), param.requires_grad) for param in group["params"]]
            for group in self.param_groups
        ] + [self._option(name) for name in options.LOWER_BOUND_OPTIONS]
        if self._plan is None or key != self._plan_key:
            self._plan, self._plan_key = self._new_plan(), key
        return self._plan

    def _new_plan(self) -> Plan:
        groups, momo = self.param_groups, self._option("momo")
        given = [[reference() for reference in references] for references in self._given]
        names = [options.parameter_names(group, i, len(given[i])) for i, group in enumerate(groups)]
        ranks, holdings = bind([group["params"] for group in groups], given, names)
        pieces = make_pieces(groups, names, holdings, self._option("descent"))
        pieces = [x for x in pieces if prod(x.holding.shape) and (x.moves or x.tensor in self.state)]
        if not pieces:
            raise RuntimeError("no parameter of the optimizer requires a gradient: there is nothing to step.")
        plan = make_plan(pieces, ranks, self._option("polar_steps"), self._option("workspace") * MIB)
        rule = (self._option(name) for name in options.LOWER_BOUND_OPTIONS)
        self._lower_bound = lower_bound(*rule)
        self._history = History(
            self.state,
            pieces,
            momo=momo,
            bound_memory=self._lower_bound.initial,
            stale=self._option("nuclear_norm") == "stale",
            dtype=plan.dtype,
            device=plan.device,
            workspace=plan.workspace,
        )
        self._geometry = Geometry(plan, self._history, groups[0])
        return plan

    # ---------------------------------------------------------------- what the user sees

    def _report(self, plan: Plan, lr: float, checked: Checked, measured: Measured, decided: Decided) -> None:
        record = StepRecord(
            lr=lr,
            step_size=decided.step_size,
            truncated=decided.truncated,
            dual_norm=decided.dual,
            loss=checked.loss,
            running_loss=self._history.running_loss.clone() if checked.inner is not None else None,
            lower_bound=decided.lower_bound,
            nuclear_norms=torch.cat([plan.scales[:0], *(measured.duals[batch] for batch in plan.matrices)]),
            matrix_names=plan.matrix_names(),
        )
        self._diagnostics.note(record, decided.ok)

    def diagnostics(self) -> dict[str, Any]:
        """What the last step did. Reading waits for the device; steps that nobody reads do not.

        Returns:
            An empty dict before the first step; then ``lr`` η, ``step_size`` τ, ``truncated``, ``dual_norm``
            D, ``loss`` (mean over the ranks, None if unknown), ``running_loss`` f̄ (None without Momo),
            ``loss_lower_bound`` F* (None where a rule knows none), ``nuclear_norms`` by the matrix's name
            (as the step used them: exact, stale or Frobenius), and counts since the optimizer was made:
            ``steps``, ``truncated_steps``, ``bad_steps``, ``consecutive_bad_steps``, and
            ``first_fatal_step``, where the last ten bad steps in a row began (0 if that did not happen).
            ``bytes_sent`` is what this rank has sent to others for the steps so far, by collective; empty
            on one device.
        """
        read = self._diagnostics.read()
        return {**read, "bytes_sent": dict(self._plan.ranks.sent)} if read and self._plan else {}

    # ---------------------------------------------------------------- checkpoints

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of an optimizer of the same method.

        Unlike torch's own, it leaves the dtype of the state as it was saved: float32 for bfloat16
        parameters. Options that differ are taken from the checkpoint, with a warning.

        Raises:
            ValueError: The checkpoint is of another method, or its groups or parameters do not fit.
        """
        for ours, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            options.check_checkpoint(ours, saved)
        params = [param for group in self.param_groups for param in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved_states = [state_dict["state"].get(i, {}) for i in saved_ids]
        for param, saved in zip(params, saved_states, strict=False):
            options.check_momentum(param, saved.get("momentum"))
        super().load_state_dict(state_dict)
        for param, saved in zip(params, saved_states, strict=True):
            for key, value in saved.items():
                self.state[param][key] = value.detach().to(param.device, copy=True)


def _is_captured(device: torch.device) -> bool:
    """Whether what is done now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _references(group: dict[str, Any]) -> list[weakref.ref[Tensor]]:
    """To the parameters of a group. They keep nothing alive: FSDP2 lets go of the ones that it replaces."""
    return [weakref.ref(param) for param in group["params"]]
