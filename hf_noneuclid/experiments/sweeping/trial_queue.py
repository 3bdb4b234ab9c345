"""The queue of a sweep: which run a worker takes next, and who takes up the run of a worker that died.

Any number of workers, on any hosts, share a queue through the study's storage. Nothing but the claiming of a
trial is atomic there, so two workers may enqueue one run twice. Of the trials of a run the lowest number that
is alive wins; whoever claims another one drops it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, Trial, TrialState

from hf_noneuclid.experiments.sweeping.study import (
    FAILURES,
    by_run,
    distributions,
    failures,
    history_attributes,
    parameters,
    results,
    state_of,
)
from hf_noneuclid.experiments.sweeping.suite import Run, Suite

HEARTBEAT = 20.0  # seconds
STALE = 90.0  # seconds without a heartbeat after which a worker is dead
ALIVE = (TrialState.RUNNING, TrialState.WAITING)


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a run ended.

    Attributes:
        state: `done` and `diverged` are results, `refused` is bad input, `interrupted` is to be repeated.
        loss: final validation loss in nats per token, when done.
        diverged_at: step.
        seconds: wall clock, start-up included.
        metrics: of metrics.json; of a failure, its `reason`.
        history: the Trainer's log history.
    """

    state: str
    loss: float | None = None
    diverged_at: int | None = None
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """A run that is this worker's to do."""

    run: Run
    trial: Trial


class TrialQueue:
    """The queue of one study, as one process sees it; its threads may share it.

    Args:
        study: with a suite.
        suite: of the study.
        stale: seconds without a sign of life after which another host's worker counts as dead.
    """

    def __init__(self, study: optuna.Study, suite: Suite, stale: float = STALE) -> None:
        self.study, self.suite, self._stale = study, suite, stale
        self._distributions = distributions(suite)
        self._lock = threading.RLock()
        self._own: set[int] = set()
        self._seen: dict[int, tuple[Any, float]] = {}

    def claim(self) -> Claim | None:
        """Take the next run: None if there is nothing to take now."""
        with self._lock:
            self.take_up()
            self.refill()
            while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                trial = self.study.ask(self._distributions)
                self._own.add(trial.number)
                key = trial.user_attrs.get("run")
                if key is not None and not self._is_taken(trial.number, key):
                    return Claim(self._sign(trial, key), trial)
                self.study.tell(trial, state=TrialState.PRUNED)  # a duplicate, or the queue was empty by now
            return None

    def refill(self) -> None:
        """Enqueue the runs that are wanted and neither ended nor in the queue."""
        trials = by_run(self.study.get_trials(deepcopy=False))
        for run in self.suite.wanted(results(self.study)):
            known = trials.get(run.key, [])
            if state_of(known) == "waiting" and not any(trial.state in ALIVE for trial in known):
                self.study.enqueue_trial(parameters(run), user_attrs={"run": run.key})

    def retry_failed(self) -> None:
        """Enqueue the runs that failed, as if they never had."""
        for result in results(self.study):
            if result.state == "failed":
                attributes = {"run": result.run.key, "again": True}
                self.study.enqueue_trial(parameters(result.run), user_attrs=attributes)

    def take_up(self) -> None:
        """Give back the runs of workers that died; their orphaned processes on this host are ended."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in self._own and self._is_dead(trial):
                end_orphans(trial.user_attrs.get("worker", {}), trial.user_attrs.get("process", {}))
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def busy(self) -> bool:
        """Say whether runs are under way or waiting, here or elsewhere."""
        return any(result.state in ("running", "waiting") for result in results(self.study))

    def renew(self, claim: Claim, process: Mapping[str, Any] | None = None) -> bool:
        """Show that a run is alive; False if it has been taken away, and must be given up.

        Args:
            claim: the run.
            process: `group`, output `folder` and `cwd` of what runs, once it does.
        """
        try:
            if process is not None:
                claim.trial.set_user_attr("process", dict(process))
            claim.trial.set_user_attr("heartbeat", time.time())
        except RuntimeError:  # in every version of Optuna what the change of a finished trial raises
            return False
        return True

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Store how an attempt ended; what was taken away meanwhile is dropped."""
        values = {
            "outcome": outcome.state,
            "seconds": outcome.seconds,
            "diverged_at": outcome.diverged_at,
            "metrics": dict(outcome.metrics),
            **history_attributes(outcome.history),
        }
        value = {"done": outcome.loss, "diverged": float("inf")}.get(outcome.state)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        try:
            for key, content in values.items():
                claim.trial.set_user_attr(key, content)
        except RuntimeError:  # as above
            return
        self.study.tell(claim.trial, value, state=state, skip_if_finished=True)

    def _sign(self, trial: Trial, key: str) -> Run:
        process = psutil.Process()
        worker = {"host": socket.gethostname(), "pid": process.pid, "created": process.create_time()}
        trial.set_user_attr("worker", worker)
        return Run.from_key(key)

    def _is_taken(self, number: int, key: str) -> bool:
        trials = by_run(self.study.get_trials(deepcopy=False))[key]
        earlier = any(trial.number < number and trial.state in ALIVE for trial in trials)
        ended = any(trial.state == TrialState.COMPLETE for trial in trials)
        return earlier or ended or failures(trials) >= FAILURES

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Judge by the process on this host; elsewhere by this host's clock, since clocks differ."""
        worker, sign = trial.user_attrs.get("worker"), trial.user_attrs.get("heartbeat")
        if worker and worker["host"] == socket.gethostname() and not _is_running(worker):
            return True
        now = time.monotonic()
        if trial.number not in self._seen or self._seen[trial.number][0] != sign:
            self._seen[trial.number] = (sign, now)
        return now - self._seen[trial.number][1] > self._stale


def end_orphans(worker: Mapping[str, Any], process: Mapping[str, Any]) -> None:
    """Kill what a dead worker of this host left running.

    Args:
        worker: its `host`.
        process: output `folder` of the run, which its command names, and `cwd`; numbers are used again.
    """
    if worker.get("host") != socket.gethostname() or not process:
        return
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(process["folder"] in word for word in candidate.cmdline())
            if named and candidate.cwd() == process["cwd"]:
                candidate.kill()


def _is_running(worker: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(worker["pid"])
        return process.create_time() == worker["created"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
