"""The loop of a worker: take a run from the queue, do it, tell; until nothing is left anywhere."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.sweeping.study import results
from hf_noneuclid.experiments.sweeping.suite import Run
from hf_noneuclid.experiments.sweeping.trial_queue import HEARTBEAT, Claim, Outcome, TrialQueue

POLL = 2.0  # seconds between looks at a queue that holds nothing for us now

Execute = Callable[[Run, Callable[[Mapping[str, Any] | None], bool], int], Outcome]
Ended = Callable[[Run, Outcome], None]


def run_worker(
    queue: TrialQueue,
    execute: Execute,
    *,
    stop: threading.Event,
    slot: int = 0,
    ended: Ended = lambda run, outcome: None,
    poll: float = POLL,
) -> None:
    """Work until every run of the suite has ended, here or on another host.

    Args:
        queue: where runs come from.
        execute: does a run; is given it, what to call now and then (False: give up), and the slot.
        stop: once set, the run in hand is given up and goes back to the queue.
        slot: number of this worker on this host, from 0.
        ended: is told of every attempt.
        poll: seconds between looks at an empty queue.

    Raises:
        InputError: the recipe refuses its input and no run has ended yet, so none would.
    """
    while not stop.is_set():
        claim = queue.claim()
        if claim is not None:
            outcome = _attempt(queue, claim, execute, stop, slot)
            ended(claim.run, outcome)
        elif queue.busy():
            stop.wait(poll)
        else:
            return


def _attempt(queue: TrialQueue, claim: Claim, execute: Execute, stop: threading.Event, slot: int) -> Outcome:
    outcome = Outcome("interrupted")
    try:
        outcome = execute(claim.run, Watch(queue, claim, stop), slot)
        if outcome.state == "refused" and not _has_results(queue):
            reason, outcome = outcome.metrics["reason"], Outcome("interrupted")
            raise InputError(f"{claim.run.label}: the recipe refuses its input; {reason}")
    finally:
        queue.finish(claim, outcome)
    return outcome


def _has_results(queue: TrialQueue) -> bool:
    return any(result.state in ("done", "diverged") for result in results(queue.study))


class Watch:
    """Keeps a run's heartbeat going, and says whether to go on with it."""

    def __init__(self, queue: TrialQueue, claim: Claim, stop: threading.Event) -> None:
        self._queue, self._claim, self._stop = queue, claim, stop
        self._renewed = time.monotonic()

    def __call__(self, process: Mapping[str, Any] | None = None) -> bool:
        now = time.monotonic()
        if process is not None or now - self._renewed > HEARTBEAT:
            self._renewed = now
            if not self._queue.renew(self._claim, process):
                return False
        return not self._stop.is_set()
