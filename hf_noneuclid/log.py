"""What the log of a training run says about its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .diagnostics import FATAL_RUN, DivergedError

if TYPE_CHECKING:
    from .optimizer import NonEuclideanDescent

logger = logging.getLogger(__name__)

_COUNTS = ("steps", "truncated_steps", "bad_steps")


def show_log() -> None:
    """Prints the package's log from level INFO to stderr, on rank 0; may be called again.

    The table of matrices and vectors is logged at INFO, which few scripts show.
    """
    package = logging.getLogger("hf_noneuclid")
    if os.environ.get("RANK", "0") != "0" or package.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # the script may print the root logger's records as well


class StepLog:
    """What a Trainer logs about its optimizer: the last step, and counts since the last log.

    Args:
        optimizer: The Trainer's; steps before this log began are not reported.
    """

    def __init__(self, optimizer: NonEuclideanDescent) -> None:
        self._optimizer = optimizer
        before = optimizer.diagnostics()
        self._before = {key: before.get(key, 0) for key in _COUNTS}
        self._began = self._before["steps"]
        self._warned_of_bound = False

    def read(self, global_step: int) -> dict[str, float]:
        """Metrics for the log; empty before the first step.

        Raises:
            DivergedError: Ten steps in a row were bad.
        """
        now = self._optimizer.diagnostics()
        if not now:
            return {}
        self._refuse_fatal(now, global_step)
        since = {key: now[key] - self._before[key] for key in _COUNTS}
        self._before = {key: now[key] for key in _COUNTS}
        metrics = {"step_size": now["step_size"], "dual_norm": now["dual_norm"]}
        if now["running_loss"] is not None:
            metrics["truncation_rate"] = since["truncated_steps"] / max(1, since["steps"])
            if now["loss_lower_bound"] is not None:
                metrics["loss_lower_bound"] = now["loss_lower_bound"]
            self._warn_of_low_loss(now["loss"], now["loss_lower_bound"])
        metrics.update(_spread(now["nuclear_norms"]))
        if since["bad_steps"]:
            logger.warning(
                "%d of the last %d steps had a NaN or infinite loss or gradient and changed nothing.",
                since["bad_steps"],
                since["steps"],
            )
            metrics["bad_steps"] = since["bad_steps"]
        return metrics

    def _refuse_fatal(self, now: dict[str, Any], global_step: int) -> None:
        first = now["first_fatal_step"]
        if not first or first + FATAL_RUN - 1 <= self._began:
            return
        # The optimizer counts steps since it was made, the Trainer since the run began.
        raise DivergedError(first + global_step - now["steps"])

    def _warn_of_low_loss(self, loss: float, bound: float | None) -> None:
        rule = self._optimizer.param_groups[0]["loss_lower_bound"]
        is_low = rule != "auto" and (bound is None or loss < (0 if isinstance(rule, str) else bound))
        if self._warned_of_bound or not is_low:
            return
        self._warned_of_bound = True
        if bound is None:
            logger.warning(
                "the loss is %g, and its mean is not above 0, where loss_lower_bound=%s knows no bound: Momo "
                "does not truncate these steps. Give a number that the loss does not go below, or use the "
                "method without Momo.",
                loss,
                rule,
            )
            return
        logger.warning(
            "the loss, %g, is below loss_lower_bound=%s (%g): the bound is wrong for this loss, and Momo "
            "takes steps that are too short, or none. Give a bound that holds, or use the method without "
            "Momo.",
            loss,
            rule,
            bound,
        )


def _spread(nuclear_norms: Mapping[str, float]) -> dict[str, float]:
    """The largest, median and smallest norm, since a curve for each matrix is too much; empty without any."""
    if not nuclear_norms:
        return {}
    norms = list(nuclear_norms.values())
    # Unlike max() and sorted(), numpy returns NaN if one of the norms is NaN.
    return {
        "nuclear_norm_max": float(np.max(norms)),
        "nuclear_norm_median": float(np.median(norms)),
        "nuclear_norm_min": float(np.min(norms)),
    }
