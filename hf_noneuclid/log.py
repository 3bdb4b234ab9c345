"""What the log of a training run says about its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .diagnostics import FATAL_RUN, DivergedError

if TYPE_CHECKING:
    from .optimizer import NonEuclideanDescent

logger = logging.getLogger(__name__)

_COUNTS = ("steps", "bad_steps", "truncated_steps", "limited_steps", "zero_steps")


def show_log() -> None:
    """Prints the package's log from level INFO, which few scripts show, to stderr, on rank 0.

    It may be called again.
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
        self._began = self._before = self._last_moved = self._counts()
        self._watched: dict[str, int] | None = None
        self._warned_of_bound = self._warned_of_zero_steps = self._warned_of_limit = False

    def _counts(self) -> dict[str, int]:
        now = self._optimizer.diagnostics()
        return {key: now.get(key, 0) for key in _COUNTS}

    @property
    def _step_size(self) -> str:
        """The option; loading a checkpoint may change it."""
        return str(self._optimizer.param_groups[0]["step_size"])

    def read(self, global_step: int) -> dict[str, float]:
        """Metrics for the log; empty before the first step.

        Raises:
            DivergedError: Ten steps in a row were bad.
        """
        now = self._optimizer.diagnostics()
        if not now:
            return {}
        self._refuse_fatal(now, global_step)
        counts = {key: now[key] for key in _COUNTS}
        since, self._before = _difference(counts, self._before), counts
        metrics = {"step_size": now["step_size"]}
        if "slope" in self._step_size:
            metrics["vector_step_size"] = now["vector_step_size"]
        metrics["dual_norm"] = now["dual_norm"]
        if self._step_size != "rate" and since["steps"]:
            metrics["limited_rate"] = since["limited_steps"] / since["steps"]
        if since["zero_steps"]:
            metrics["zero_steps"] = since["zero_steps"]
        self._last_moved = counts if _moved(since) else self._last_moved
        self._warn_of_zero_steps(now, counts["steps"] - self._last_moved["steps"])
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
        if not first or first + FATAL_RUN - 1 <= self._began["steps"]:
            return
        # The optimizer counts steps since it was made, the Trainer since the run began.
        raise DivergedError(first + global_step - now["steps"])

    def watch(self) -> None:
        """Warns if the learning rate bounded every step since the last call, though another rule should."""
        before, self._watched = self._watched, self._counts()
        if before is None or self._warned_of_limit or self._step_size == "rate":
            return
        since = _difference(self._watched, before)
        if 0 < since["limited_steps"] == _moved(since):
            self._warned_of_limit = True
            logger.warning(
                "the learning rate bounded each of the last %d steps, so that it limits this run, and not "
                "step_size=%s. Raise it (learning_rate=1 hardly ever limits a step) unless you mean it.",
                since["steps"],
                self._step_size,
            )

    def tell_limited(self) -> None:
        """Says at INFO how many steps the learning rate has bounded since this log began."""
        since = _difference(self._counts(), self._began)
        if self._step_size == "rate" or not since["steps"]:
            return
        if since["limited_steps"]:
            logger.info(
                "%d of %d steps were limited by the learning rate", since["limited_steps"], since["steps"]
            )
        else:
            logger.info("no step was limited by the learning rate")

    def _warn_of_zero_steps(self, now: dict[str, Any], steps: int) -> None:
        """Warns once if so many steps have not moved anything, though the learning rate is not 0.

        Single ones are no fault: Momo takes none after a batch of a low loss.
        """
        if self._warned_of_zero_steps or steps < FATAL_RUN or not now["zero_steps"] or now["lr"] == 0:
            return
        self._warned_of_zero_steps = True
        if now["dual_norm"] == 0:
            logger.warning(
                "the last %d steps were 0, because all gradients were: check that the loss depends on the "
                "parameters that are trained.",
                steps,
            )
            return
        logger.warning(
            "the last %d steps were 0: by Momo's model of the loss, it is at its lower bound already. Give a "
            "loss_lower_bound below every loss, or use step_size=slope, which needs none.",
            steps,
        )

    def _warn_of_low_loss(self, loss: float, bound: float | None) -> None:
        if self._warned_of_bound or not (bound is None or loss < bound):
            return
        self._warned_of_bound = True
        number = self._optimizer.param_groups[0]["loss_lower_bound"]
        if bound is None:
            logger.warning(
                "a loss was below loss_lower_bound=%s: the bound is wrong for this loss, and is not used any "
                "more. The slope alone bounds the steps.",
                number,
            )
            return
        logger.warning(
            "the loss, %g, is below loss_lower_bound=%s: the bound is wrong for this loss, and Momo takes "
            "steps that are too short, or none. Give a bound that holds, or use the method without Momo.",
            loss,
            number,
        )


def limited_steps(history: Iterable[Mapping[str, Any]]) -> int | None:
    """How many steps the learning rate bounded, by a Trainer's log; None if no other rule bounds steps."""
    rows = [row for row in history if "limited_rate" in row]
    before = [0, *(row["step"] for row in rows)]
    counts = [row["limited_rate"] * (row["step"] - x) for row, x in zip(rows, before, strict=False)]
    return round(sum(counts)) if rows else None


def _difference(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {key: now[key] - before[key] for key in _COUNTS}


def _moved(counts: Mapping[str, int]) -> int:
    """The number of steps that changed a parameter."""
    return counts["steps"] - counts["bad_steps"] - counts["zero_steps"]


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
