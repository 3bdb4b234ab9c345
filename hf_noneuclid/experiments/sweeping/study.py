"""Studies: the runs of a suite and their outcomes, as the trials of an Optuna study.

The user attribute ``run`` of a trial holds the key of its run. A run that was interrupted or failed may have
several trials: they stay in the study.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.experiments.sweeping.suite import Result, Run, State, Suite

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the sweep reports failed runs itself

HEARTBEAT, GRACE = 5, 30  # seconds; a worker that is silent for longer is dead
ROWS = 100  # of the history in one attribute: some databases store at most 64 KiB of text


def default_storage(folder: Path) -> str:
    """The storage of the study of an output folder, where the user names none."""
    return str(folder / "study.db")


def open_study(storage: str | Path, name: str | None = None, *, suite: Suite | None = None) -> optuna.Study:
    """Opens a study.

    Args:
        storage: Path of a SQLite file, or the URL of a database.
        name: Name of the study; may be left out where the storage holds only one.
        suite: Makes the study of this suite if there is none. It does not write the suite to it.

    Raises:
        InputError: The storage cannot be reached, or holds no such study.
    """
    shown = scrub(str(storage))
    try:
        backend = _backend(str(storage), create=suite is not None)
        if suite is not None:
            return optuna.create_study(storage=backend, study_name=name, load_if_exists=True)
        names = optuna.get_all_study_names(backend)
    except InputError:
        raise
    except Exception as error:  # each database has its own exceptions
        first = (scrub(str(error)).strip() or "no message").splitlines()[0]
        raise InputError(f"--storage {shown} cannot be used: {type(error).__name__}: {first}") from error
    if not names:
        raise InputError(f"--storage {shown} holds no study: run noneuclid sweep first")
    if (name is None and len(names) > 1) or (name is not None and name not in names):
        raise InputError(
            f"--storage {shown} holds no study {name or ''}; give --study_name: {', '.join(names)}"
        )
    return optuna.load_study(study_name=name or names[0], storage=backend)


def _backend(storage: str, create: bool) -> RDBStorage:
    if "://" not in storage:
        path = Path(storage).absolute()
        if not create and not path.is_file():
            raise InputError(
                f"there is no study at {storage}: run noneuclid sweep first, or name it with --storage"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{path}"
    is_sqlite = storage.startswith("sqlite")
    settings = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    with warnings.catch_warnings():  # heartbeats are experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = RDBStorage(
            storage, engine_kwargs=settings, heartbeat_interval=HEARTBEAT, grace_period=GRACE
        )
    if not is_sqlite:
        return backend

    # Optuna claims a trial by reading its state with FOR UPDATE and then writing it. SQLite has no such lock:
    # two processes could both read before either writes, and both would claim the trial. Therefore every
    # transaction starts with the lock for writing (SQLAlchemy's own recipe for pysqlite).
    @event.listens_for(backend.engine, "connect")
    def _disable_implicit_begin(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(backend.engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    backend.engine.dispose()  # the connections that were made before the listeners
    return backend


def suite_of(study: optuna.Study) -> Suite:
    """The suite as it was when the study was made.

    Raises:
        InputError: ``noneuclid sweep`` did not make the study.
    """
    values = study.user_attrs.get("suite")
    if values is None:
        raise InputError(f"study {study.study_name} holds no suite: noneuclid sweep did not make it")
    return Suite(**values)


def results(study: optuna.Study) -> list[Result]:
    """One result for each run that has a trial, in the order of the suite."""
    trials = by_run(study.get_trials(deepcopy=False))
    order = {run.key: position for position, run in enumerate(suite_of(study).possible_runs())}
    keys = sorted(trials, key=lambda key: (order.get(key, len(order)), key))
    return [_result(Run.from_key(key), trials[key]) for key in keys]


def by_run(trials: Iterable[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """The trials of each run by its key, without those that were dropped as duplicates."""
    runs: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if "run" in trial.user_attrs and trial.state != TrialState.PRUNED:
            runs.setdefault(trial.user_attrs["run"], []).append(trial)
    return runs


def outcome_attributes(result: Result) -> dict[str, Any]:
    """The outcome of a run as user attributes of its trial; its loss is the value of the trial."""
    rows = result.history
    return {
        "seconds": result.seconds,
        "diverged_at": result.diverged_at,
        **{f"history {i // ROWS}": rows[i : i + ROWS] for i in range(0, len(rows), ROWS)},
        "metrics": dict(result.metrics),
    }


def _result(run: Run, trials: Sequence[FrozenTrial]) -> Result:
    states = [trial.state for trial in trials]
    if TrialState.COMPLETE in states:
        trial = trials[states.index(TrialState.COMPLETE)]
        state: State = "done" if math.isfinite(trial.value or 0.0) else "diverged"
    elif TrialState.RUNNING in states:
        return Result(run, "running")
    elif TrialState.WAITING in states or "metrics" not in trials[-1].user_attrs:  # new, or interrupted
        return Result(run, "waiting")
    else:
        trial, state = trials[-1], "failed"
    values = trial.user_attrs
    return Result(
        run,
        state,
        loss=trial.value if state == "done" else None,
        diverged_at=values.get("diverged_at"),
        seconds=values.get("seconds"),
        metrics=values.get("metrics", {}),
        history=_history(values),
    )


def _history(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log history. JSON holds null for NaN and infinity: they become NaN again."""
    rows = [row for i in range(len(values)) for row in values.get(f"history {i}", [])]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]
