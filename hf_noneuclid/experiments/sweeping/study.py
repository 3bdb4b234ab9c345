"""Studies: the runs of a suite and what came of them, as trials of an Optuna study.

A run is a trial whose user attribute `run` holds the run's key. Trials of a run that was taken up again, or
failed and was retried, stay in the study; the latest says how the run stands.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.sweeping.suite import Run, Suite

optuna.logging.set_verbosity(optuna.logging.WARNING)

State = Literal["done", "diverged", "failed", "running", "waiting"]
ROWS = 100  # of the history in one attribute: some databases keep no text above 64 KiB
FAILURES = 2  # a run that failed so often is not tried again


@dataclass(frozen=True)
class Result:
    """How a run stands, and what came of it.

    Attributes:
        run: which.
        state: `done` and `diverged` are results; `failed` runs were retried.
        loss: final validation loss in nats per token; None unless done.
        diverged_at: first step that was not finite; None unless diverged, or where nobody saw it.
        seconds: wall clock of the run, start-up included; None where it was resumed, or has not ended.
        metrics: what its metrics.json holds; of a failed run, `reason`.
        history: the Trainer's log history.
    """

    run: Run
    state: State
    loss: float | None = None
    diverged_at: int | None = None
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def default_storage(folder: Path) -> str:
    """Return where the study of an output folder is kept unless the user says otherwise."""
    return str(folder / "study.log")


def open_study(storage: str | Path, name: str | None = None, *, suite: Suite | None = None) -> optuna.Study:
    """Open a study.

    Args:
        storage: an Optuna journal file, a path ending in .db (SQLite), or the URL of a database.
        name: of the study; may be left out where there is only one.
        suite: makes the study if there is none; the learning rates and so on that its trials may have.

    Raises:
        InputError: the storage cannot be reached, or holds no such study.
    """
    shown = hide_password(str(storage))
    try:
        backend = _backend(str(storage), create=suite is not None)
        if suite is not None:
            return optuna.create_study(
                storage=backend, study_name=name, sampler=_Sampler(_grid(suite)), load_if_exists=True
            )
        names = optuna.get_all_study_names(backend)
    except InputError:
        raise
    except Exception as error:  # each database has exceptions of its own
        first = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(f"--storage {shown} cannot be used: {type(error).__name__}: {first}") from error
    if not names:
        raise InputError(f"--storage {shown} holds no study: run sweep.py first")
    if (name is None and len(names) > 1) or (name is not None and name not in names):
        raise InputError(f"--storage {shown} holds no study {name or ''}; name one of: {', '.join(names)}")
    return optuna.load_study(study_name=name or names[0], storage=backend)


def results(study: optuna.Study) -> list[Result]:
    """Return one result a run, in the order of the suite."""
    trials = by_run(study.get_trials(deepcopy=False))
    order = {run.key: position for position, run in enumerate(suite_of(study).possible_runs())}
    keys = sorted(trials, key=lambda key: (order.get(key, len(order)), key))
    return [_result(Run.from_key(key), trials[key]) for key in keys]


def suite_of(study: optuna.Study) -> Suite:
    """Return the suite as it was when the study was made.

    Raises:
        InputError: the study was not made by sweep.py.
    """
    values = study.user_attrs.get("suite")
    if values is None:
        raise InputError(f"study {study.study_name} holds no suite: sweep.py did not make it")
    return Suite.from_dict(values)


def by_run(trials: Iterable[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """Return the trials of each run by its key, in their order, without those dropped as duplicates."""
    runs: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if "run" in trial.user_attrs and trial.state != TrialState.PRUNED:
            runs.setdefault(trial.user_attrs["run"], []).append(trial)
    return runs


def state_of(trials: Sequence[FrozenTrial]) -> State:
    """Return how a run stands by its trials: a result beats all else."""
    states = [trial.state for trial in trials]
    if TrialState.COMPLETE in states:
        done = trials[states.index(TrialState.COMPLETE)]
        return "done" if math.isfinite(done.value) else "diverged"
    if TrialState.RUNNING in states:
        return "running"
    given_up = TrialState.WAITING not in states and failures(trials) >= FAILURES
    return "failed" if given_up else "waiting"


def failures(trials: Sequence[FrozenTrial]) -> int:
    """Count the failures since the user last asked to try again; refused input will not get better."""
    count = 0
    for trial in trials:
        if trial.user_attrs.get("again"):
            count = 0
        count += {"failed": 1, "refused": FAILURES}.get(trial.user_attrs.get("outcome", ""), 0)
    return count


def history_attributes(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the log history as attributes of a trial."""
    return {f"history {i // ROWS}": list(history[i : i + ROWS]) for i in range(0, len(history), ROWS)}


def parameters(run: Run) -> dict[str, Any]:
    """Return a run as the parameters of a trial, for Optuna's own tools to show."""
    return {"curve": run.label, "learning_rate": run.learning_rate, "seed": run.seed}


def distributions(suite: Suite) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return which values the parameters of a suite's trials take."""
    grid = _grid(suite)
    rates = grid.pop("learning_rate")
    rate = optuna.distributions.FloatDistribution(min(rates), max(rates), log=True)
    choices = {name: optuna.distributions.CategoricalDistribution(values) for name, values in grid.items()}
    return {**choices, "learning_rate": rate}


def hide_password(storage: str) -> str:
    """Return the storage as it may be shown."""
    if "://" not in storage:
        return storage
    head, _, rest = storage.partition("://")
    user, sign, host = rest.rpartition("@")
    return f"{head}://{user.partition(':')[0]}{':***' if ':' in user else ''}{sign}{host}"


class _Sampler(optuna.samplers.GridSampler):
    """Optuna's grid sampler for trials that are enqueued, asked for and told."""

    def after_trial(self, *_: Any) -> None:
        """Do nothing: the base class would stop a loop that is not there, which is an error."""


def _grid(suite: Suite) -> dict[str, list[Any]]:
    points = [parameters(run) for run in suite.possible_runs()]
    return {name: list(dict.fromkeys(point[name] for point in points)) for name in points[0]}


def _backend(storage: str, create: bool) -> BaseStorage:
    if storage.startswith("sqlite"):
        return _sqlite(storage)
    if "://" in storage:
        return RDBStorage(storage, engine_kwargs={"pool_pre_ping": True})
    path = Path(storage).absolute()  # the lock of the journal is found by it
    if not create and not path.is_file():
        raise InputError(f"there is no study at {storage}: run sweep.py first, or name it with --storage")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".db":
        return _sqlite(f"sqlite:///{path}")
    lock = JournalFileOpenLock(str(path))
    if create:
        _repair(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _sqlite(url: str) -> RDBStorage:
    """Open a SQLite file so that transactions follow one another.

    Optuna claims a trial by reading its state with FOR UPDATE and writing it. SQLite knows no such lock: two
    processes may read before either writes, and both claim the trial.
    """
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    @event.listens_for(storage.engine, "connect")
    def _leave_begin_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections made before know nothing of it
    return storage


def _repair(path: Path, lock: JournalFileOpenLock) -> None:
    """Cut off a last line that a full disk or a kill left unfinished: the next would be joined to it."""
    lock.acquire()
    try:
        with path.open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _result(run: Run, trials: Sequence[FrozenTrial]) -> Result:
    state = state_of(trials)
    if state in ("running", "waiting"):
        return Result(run, state)
    ended = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    trial = (ended or trials)[0 if ended else -1]
    values = trial.user_attrs
    return Result(
        run,
        state,
        loss=trial.value if state == "done" else None,
        diverged_at=values.get("diverged_at") if state == "diverged" else None,
        seconds=values.get("seconds"),
        metrics=values.get("metrics", {}),
        history=_history(values),
    )


def _history(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the log history; what was NaN or infinite, which JSON does not have, is NaN again."""
    rows = [row for i in range(len(values)) for row in values.get(f"history {i}", [])]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
