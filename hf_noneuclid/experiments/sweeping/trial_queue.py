"""The queue of a sweep: which run a worker does next.

Any number of workers on any hosts share a queue through the study's storage. Optuna keeps the queue, gives
each trial to one worker, and finds dead workers by their missing heartbeat. Two workers may still enqueue the
same run: the trial with the lower number counts, and the other one is dropped.
"""

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.sweeping.study import by_run, outcome_attributes, results
from hf_noneuclid.experiments.sweeping.suite import Result, Run, Suite

POLL = 2.0  # seconds between looks at a queue that is empty while runs are under way elsewhere
ALIVE = (TrialState.RUNNING, TrialState.WAITING)

Execute = Callable[[Run, threading.Event, int], Result | None]
"""Does a run until the event is set; takes the slot of the worker. None: the run was stopped."""


class _NoLossError(Exception):
    """Makes Optuna mark the trial as failed: the run failed or was stopped."""


class TrialQueue:
    """The queue of one study in one process; its threads may share it.

    Runs that were interrupted return to it; runs that failed do not, unless the user asks for it.
    """

    def __init__(self, study: optuna.Study, suite: Suite) -> None:
        self.study, self.suite = study, suite
        self._lock = threading.Lock()

    def refill(self) -> bool:
        """Enqueues the runs that are wanted, not ended and not in the queue; says whether any run waits."""
        with self._lock:
            found = results(self.study)
            states = {result.run: result.state for result in found}
            queued = by_run(self._trials(TrialState.WAITING))
            for run in self.suite.wanted(found):
                if states.get(run, "waiting") == "waiting" and run.key not in queued:
                    self._enqueue(run)
            return bool(self._trials(TrialState.WAITING))

    def retry_failed(self) -> None:
        """Enqueues the runs that failed."""
        for result in results(self.study):
            if result.state == "failed":
                self._enqueue(result.run)

    def attempt(self, execute: Execute, stop: threading.Event, slot: int) -> Result | None:
        """Does the next run and stores its outcome; None if it was stopped or there was none.

        Raises:
            InputError: The recipe refuses its input, and no run has ended yet: all would be refused.
        """
        result: Result | None = None
        taken_away = False

        def objective(trial: Trial) -> float:
            nonlocal result, taken_away
            key = trial.user_attrs.get("run")
            if key is None or self._is_duplicate(trial.number, key):  # None: another worker took the last one
                raise optuna.TrialPruned
            # Optuna's thread may not have done this yet. A trial without a heartbeat is never given back.
            storage: Any = trial.storage
            storage.record_heartbeat(trial._trial_id)
            result = execute(Run.from_key(key), stop, slot)
            if result is None:
                raise _NoLossError
            states = [found.state for found in results(self.study)]
            if result.state == "refused" and "done" not in states and "diverged" not in states:
                raise InputError(
                    f"{result.run.label}: the recipe refuses its input; {result.metrics['reason']}"
                )
            try:
                for name, value in outcome_attributes(result).items():
                    trial.set_user_attr(name, value)
            except RuntimeError:  # the trial is finished already, in every version of Optuna
                taken_away = True
            if taken_away or result.state in ("failed", "refused"):
                raise _NoLossError
            return math.inf if result.loss is None else result.loss

        try:
            self.study.optimize(objective, n_trials=1, catch=(_NoLossError,))
        except ValueError:
            # We were silent for so long that another worker took the run over: its outcome is not ours.
            if not taken_away:
                raise
        return result

    def busy(self) -> bool:
        """Whether a run is under way here or elsewhere. The runs of dead workers return to the queue."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        return any(result.state in ("running", "waiting") for result in results(self.study))

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return list(self.study.get_trials(deepcopy=False, states=states))

    def _enqueue(self, run: Run) -> None:
        self.study.enqueue_trial({}, user_attrs={"run": run.key})

    def _is_duplicate(self, number: int, key: str) -> bool:
        trials = by_run(self.study.get_trials(deepcopy=False))[key]
        earlier = any(trial.number < number and trial.state in ALIVE for trial in trials)
        return earlier or any(trial.state == TrialState.COMPLETE for trial in trials)


def run_worker(
    queue: TrialQueue,
    execute: Execute,
    *,
    stop: threading.Event,
    slot: int = 0,
    ended: Callable[[Result], None] = lambda result: None,
    poll: float = POLL,
) -> None:
    """Works until every run of the suite has ended, here or on another host.

    Args:
        queue: Gives the runs.
        execute: Does a run.
        stop: Once it is set, the run in hand is stopped and returns to the queue.
        slot: Number of this worker on this host, from 0.
        ended: Is called with the outcome of every run.
        poll: Seconds between looks at an empty queue.

    Raises:
        InputError: The recipe refuses its input, and no run has ended yet.
    """
    while not stop.is_set():
        if queue.refill():
            result = queue.attempt(execute, stop, slot)
            if result is not None:
                ended(result)
        elif queue.busy():
            stop.wait(poll)
        else:
            return
