"""Sweeps: no run twice, no run lost, and what a user is told."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import psutil
import pytest
import yaml

from hf_noneuclid.experiments import report, sweep
from hf_noneuclid.experiments.common import ExitCode, InputError
from hf_noneuclid.experiments.sweeping import execution
from hf_noneuclid.experiments.sweeping.commands import Launch
from hf_noneuclid.experiments.sweeping.execution import Executor, can_resume, check_folder, run_folder
from hf_noneuclid.experiments.sweeping.study import open_study, results, suite_of
from hf_noneuclid.experiments.sweeping.suite import Result, load_suites
from hf_noneuclid.experiments.sweeping.trial_queue import TrialQueue, run_worker

ROOT = Path(__file__).parents[1]

TINY = {
    "about": "As small as it gets.",
    "recipe": "pretrain",
    "options": {
        "use_cpu": True,
        "config_overrides": "n_layer=1,n_embd=16,n_head=2",
        "vocab_size": 300,
        "block_size": 32,
        "sample_tokens": 0,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_steps": 0.999,
        "max_validation_blocks": 4,
        "save_strategy": "no",
    },
    "grid": [{"method": ["muon", "muon_momo"], "learning_rate": [1e-3, 1e-2, 1e-1]}],
}


def load_suite(*arguments):
    (suite,) = load_suites(*arguments)
    return suite


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{i} the king of the land\n" for i in range(300)), encoding="utf-8")
    return str(path)


@pytest.fixture
def suite(tmp_path):
    return load_suite(write(tmp_path))


@pytest.fixture
def study(tmp_path, suite):
    return stored(tmp_path / "study.db", suite)


def write(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def stored(storage, suite):
    study = open_study(storage, suite.name, suite=suite)
    study.set_user_attr("suite", asdict(suite))
    return study


def succeed(run, stop, slot):
    return Result(run, "done", loss=run.learning_rate + run.seed, seconds=1.0)


def work(study, execute, **options):
    queue = TrialQueue(study, suite_of(study))
    run_worker(queue, execute, stop=options.pop("stop", threading.Event()), poll=0.2, **options)


def states(study):
    return [result.state for result in results(study)]


def count(trials, *states):
    return sum(trial.state in states for trial in trials)


# ---------------------------------------------------------------- the queue


def test_every_run_is_done_once(study, suite):
    done = []
    work(study, lambda run, stop, slot: done.append(run) or succeed(run, stop, slot))
    assert done == suite.runs()
    work(study, lambda *_: pytest.fail("a run was repeated"))
    assert [result.run for result in results(study)] == suite.runs()
    assert [result.loss for result in results(study)] == [run.learning_rate for run in suite.runs()]


def test_further_seeds_are_run_after_the_first(tmp_path):
    suite = load_suite(write(tmp_path, more_seeds={"seeds": [1], "within_decades": 1}))
    study, done = stored(tmp_path / "study.db", suite), []
    work(study, lambda run, stop, slot: done.append(run) or succeed(run, stop, slot))
    assert done[:6] == suite.runs()
    assert {(run.learning_rate, run.seed) for run in done[6:]} == {(1e-3, 1), (1e-2, 1)}
    assert len(done) == 10


def test_an_outcome_comes_back_as_it_was(study):
    history = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(250)] + [{"step": 250, "loss": None}]
    outcome = {"loss": 2.5, "seconds": 7.0, "metrics": {"steps": 250}, "history": history}
    work(study, lambda run, *_: Result(run, "done", **outcome))
    result = results(study)[0]
    assert (result.loss, result.seconds, result.metrics) == (2.5, 7.0, {"steps": 250})
    assert result.history[:250] == history[:250]
    assert math.isnan(result.history[250]["loss"])


def test_a_diverged_run_is_a_result(study):
    work(study, lambda run, *_: Result(run, "diverged", diverged_at=12))
    assert states(study) == ["diverged"] * 6
    assert {(result.loss, result.diverged_at) for result in results(study)} == {(None, 12)}
    work(study, lambda *_: pytest.fail("a diverged run was repeated"))


def test_a_failed_run_is_tried_again_if_the_user_says_so(study, suite):
    bad, tried = suite.runs()[2], []

    def fail_once(run, stop, slot):
        tried.append(run)
        reason = {"reason": "boom"}
        return Result(run, "failed", metrics=reason) if run == bad else succeed(run, stop, slot)

    work(study, fail_once)
    assert tried == suite.runs()
    failed = results(study)[2]
    assert (failed.state, failed.loss, failed.metrics["reason"]) == ("failed", None, "boom")
    work(study, lambda *_: pytest.fail("a run that failed was tried"))
    TrialQueue(study, suite).retry_failed()
    assert results(study)[2].state == "waiting"
    work(study, fail_once)
    assert results(study)[2].state == "failed"
    TrialQueue(study, suite).retry_failed()
    work(study, succeed)
    assert states(study) == ["done"] * 6


def test_refused_input_fails_a_run_but_as_the_first_run_it_ends_the_sweep(study, suite):
    def refuse(run, stop, slot):
        return Result(run, "refused", metrics={"reason": "error: no such file"})

    with pytest.raises(InputError, match="no such file"):
        work(study, refuse)
    assert set(states(study)) == {"waiting"}, "the user will mend it"
    bad, tried = suite.runs()[3], []
    work(study, lambda run, *_: tried.append(run) or (refuse if run == bad else succeed)(run, *_))
    assert tried.count(bad) == 1
    assert states(study).count("failed") == 1


def test_of_two_trials_of_a_run_the_lower_number_wins(study, suite):
    queue, done = TrialQueue(study, suite), []
    queue.refill()
    for run in suite.runs():
        queue._enqueue(run)  # another worker did not know of them
    work(study, lambda run, *_: done.append(run) or succeed(run, *_))
    assert done == suite.runs()
    assert count(study.get_trials(), optuna.trial.TrialState.PRUNED) == 6


def test_an_interrupted_run_goes_back_to_the_queue(study):
    def interrupted(run, stop, slot):
        stop.set()

    work(study, interrupted)
    assert set(states(study)) == {"waiting"}
    work(study, succeed)
    assert states(study) == ["done"] * 6


def test_an_exception_gives_the_run_back(study):
    def breaks(run, stop, slot):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        work(study, breaks)
    work(study, succeed)
    assert states(study) == ["done"] * 6


def test_what_was_taken_away_is_not_stored(study, suite):
    queue = TrialQueue(study, suite)
    queue.refill()

    def lose(run, stop, slot):
        (trial,) = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return succeed(run, stop, slot)

    queue.attempt(lose, threading.Event(), 0)
    assert results(study)[0].state == "waiting"


def _take_and_die(storage, name):
    def die(*_):
        os._exit(9)

    study = open_study(storage, name)
    run_worker(TrialQueue(study, suite_of(study)), die, stop=threading.Event())


def test_a_dead_worker_is_noticed_by_its_silence(tmp_path, suite, monkeypatch):
    monkeypatch.setattr("hf_noneuclid.experiments.sweeping.study.HEARTBEAT", 1)
    monkeypatch.setattr("hf_noneuclid.experiments.sweeping.study.GRACE", 3)
    study, storage = stored(tmp_path / "study.db", suite), str(tmp_path / "study.db")
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(storage, suite.name))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert results(study)[0].state == "running"
    work(study, succeed)
    assert states(study) == ["done"] * 6


def test_a_worker_that_is_slow_is_not_taken_for_dead(tmp_path, suite, monkeypatch):
    monkeypatch.setattr("hf_noneuclid.experiments.sweeping.study.HEARTBEAT", 1)
    monkeypatch.setattr("hf_noneuclid.experiments.sweeping.study.GRACE", 2)
    study = stored(tmp_path / "study.db", suite)

    def slow(run, stop, slot):
        if run == suite.runs()[0]:
            time.sleep(4)
            assert TrialQueue(study, suite).busy()
            assert results(study)[0].state == "running"
        return succeed(run, stop, slot)

    work(study, slow)
    assert states(study) == ["done"] * 6


def _work_in_turn(storage, name, log, barrier):
    study = open_study(storage, name)

    def note(run, stop, slot):
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(run.key + "\n")
        time.sleep(0.01)
        return succeed(run, stop, slot)

    barrier.wait()
    work(study, note)


def test_two_processes_that_start_at_the_same_moment_share_the_runs(tmp_path):
    storage = "study.db"
    grid = [{"method": ["muon", "scion"], "learning_rate": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}]
    suite = load_suite(write(tmp_path, grid=grid, more_seeds={"seeds": [1], "within_decades": 1}))
    stored(tmp_path / storage, suite)
    context, log = multiprocessing.get_context("spawn"), tmp_path / "done.txt"
    barrier = context.Barrier(2)
    arguments = (str(tmp_path / storage), suite.name, str(log), barrier)
    processes = [context.Process(target=_work_in_turn, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    done = log.read_text().splitlines()
    assert len(done) == len(set(done)) == 14
    assert set(states(open_study(tmp_path / storage))) == {"done"}


# ---------------------------------------------------------------- studies


def test_a_study_that_is_not_there_is_an_error(tmp_path, study):
    with pytest.raises(InputError, match="run noneuclid sweep first"):
        open_study(tmp_path / "other.db")
    assert not (tmp_path / "other.db").exists()
    with pytest.raises(InputError, match="no study maxi; give --study_name: tiny"):
        open_study(tmp_path / "study.db", "maxi")


def test_a_storage_that_cannot_be_reached_is_an_error_without_the_password(tmp_path, suite):
    with pytest.raises(InputError) as caught:
        open_study(f"sqlite:///{tmp_path}/none/study.db", "x", suite=suite)
    assert "OperationalError" in str(caught.value)
    with pytest.raises(InputError) as caught:
        open_study("nodatabase://me:secret@host/db", "x", suite=suite)
    assert "secret" not in str(caught.value)


def test_another_suite_is_refused_with_the_difference(tmp_path, study, suite):
    other = replace(suite, options={**suite.options, "max_steps": 9}, about="Changed.")
    with pytest.raises(InputError) as caught:
        sweep.check_same(suite, other, "study.db")
    message = str(caught.value)
    assert "-  max_steps: 2\n+  max_steps: 9" in message
    assert "--output_dir" in message
    assert "Changed" not in message
    sweep.check_same(suite, replace(suite, about="Changed.", report={"x": 1}), "study.db")


# ---------------------------------------------------------------- tasks


def test_one_task_after_the_other_and_their_common_table(tmp_path, monkeypatch, capsys):
    fake_recipe(monkeypatch, WRITE)
    rule = {
        "method": "muon",
        "learning_rate": 1.0,
        "method_options": {"step_size": ["slope"]},
        "column": "rule",
    }
    grid = [{"method": "muon", "column": "tuned"}, rule]
    tasks = {"b": {"learning_rate": {"muon": [1e-3, 1e-2]}}, "a": {"learning_rate": {"muon": 0.1}}}
    path, folder = write(tmp_path, grid=grid, tasks=tasks), tmp_path / "out"
    sweep.main([f"--suite={path}", f"--output_dir={folder}", "--task=a"])
    assert not (folder / "b").exists()
    monkeypatch.setattr(execution.Executor, "__call__", _only_of(folder / "b", execution.Executor.__call__))
    sweep.main([f"--suite={path}", f"--output_dir={folder}"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("failed")]
    assert lines == [
        "2 done, 0 diverged, 0 failed",
        "3 done, 0 diverged, 0 failed",
        "2 done, 0 diverged, 0 failed",
    ]

    report.main([f"--study={folder}"])
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "| task | tuned | rule |" in text
    assert text.index("| b | 1.5000 at 0.001 | 1.5000 (+0.0 %) |") < text.index("| a | 1.5000 at 0.1 |")
    report.main([f"--study={folder / 'a'}"])
    assert "--suite tiny --task a" in (folder / "a" / "report" / "report.md").read_text(encoding="utf-8")


def test_a_task_that_cannot_run_does_not_keep_the_others_from_running(tmp_path, monkeypatch, capsys):
    fake_recipe(monkeypatch, WRITE)
    tasks = {"bad": {"options": {"max_step": 3}}, "good": {}}
    path, folder = write(tmp_path, tasks=tasks), tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        sweep.main([f"--suite={path}", f"--output_dir={folder}"])
    assert end.value.code == ExitCode.BAD_INPUT
    text = capsys.readouterr().err
    assert "error: tiny/bad: suite tiny/bad, muon: pretrain.py has no option 'max_step'" in text
    assert "6 done, 0 diverged, 0 failed" in text


def _only_of(folder, call):
    def guarded(executor, run, stop, slot=0):
        assert executor.output_dir == folder, "a finished run was repeated"
        return call(executor, run, stop, slot)

    return guarded


# ---------------------------------------------------------------- the processes of a run


def fake_recipe(monkeypatch, code):
    """Let the executor start a few lines of Python; they find the folder as `folder`."""
    head = "import json, pathlib, sys, time; folder = pathlib.Path(sys.argv[-2].partition('=')[2])\n"
    monkeypatch.setattr(execution, "command_of", lambda *_: [sys.executable, "-S", "-c", head + code])


WRITE = """
metrics = {"eval_loss": 1.5, "diverged": False}
(folder / "history.json").write_text("[]")
(folder / "metrics.json").write_text(json.dumps(metrics))
(folder / "model.safetensors").write_text("weights")
"""


def execute(tmp_path, suite, stop=None, **options):
    executor = Executor(suite, tmp_path / "out", Launch(), "this study", **options)
    return executor(suite.runs()[0], stop or threading.Event()), run_folder(tmp_path / "out", suite.runs()[0])


@pytest.mark.parametrize("keep", [False, True])
def test_the_weights_of_a_run_are_deleted_unless_wanted(tmp_path, suite, monkeypatch, keep):
    fake_recipe(monkeypatch, WRITE)
    outcome, folder = execute(tmp_path, suite, keep_models=keep)
    assert (outcome.state, outcome.loss) == ("done", 1.5)
    assert (folder / "model.safetensors").exists() == keep
    assert (folder / "metrics.json").exists()


def test_what_a_dead_worker_could_not_tell_is_read_from_the_folder(tmp_path, suite, monkeypatch):
    fake_recipe(monkeypatch, WRITE)
    execute(tmp_path, suite)
    fake_recipe(monkeypatch, "sys.exit('a run was repeated')")
    assert execute(tmp_path, suite)[0].loss == 1.5
    other = replace(suite, options={**suite.options, "max_steps": 9})
    assert execute(tmp_path, other)[0].state == "failed", "of another suite: not taken for this one's"


STARTED = """
is_start = folder.name == "start"
assert is_start or (folder.parents[1] / "start" / "model.safetensors").is_file()
with (folder.parent / "order.txt").open("a") as stream:
    stream.write(f"{folder.name} ")
"""


def test_the_model_that_runs_start_from_is_trained_once_before_them_and_kept(tmp_path, monkeypatch):
    fake_recipe(monkeypatch, STARTED + WRITE)
    suite = load_suite(write(tmp_path, start={"optim": "muon"}))
    executor = Executor(suite, tmp_path / "out", Launch(), "this study")
    outcomes = [executor(run, threading.Event()) for run in suite.runs()[:2]]
    assert [outcome.state for outcome in outcomes] == ["done", "done"], outcomes[0].metrics
    assert (tmp_path / "out" / "order.txt").read_text() == "start "
    assert len((tmp_path / "out" / "runs" / "order.txt").read_text().split()) == 2


def test_a_model_to_start_from_that_cannot_be_trained_ends_the_sweep(tmp_path, monkeypatch):
    fake_recipe(monkeypatch, "sys.exit(1)")
    suite = load_suite(write(tmp_path, start={"optim": "muon"}))
    study = stored(tmp_path / "study.db", suite)
    with pytest.raises(InputError, match=r"was not trained: see .*start\.log"):
        work(study, Executor(suite, tmp_path / "out", Launch(), "this study"))
    assert set(states(study)) == {"waiting"}


@pytest.mark.parametrize(("code", "state"), [(2, "refused"), (1, "failed"), (-9, "failed")])
def test_a_run_that_fails_shows_the_end_of_its_log(tmp_path, suite, monkeypatch, code, state):
    how = f"sys.exit({code})" if code > 0 else "import os; os.kill(os.getpid(), 9)"
    fake_recipe(monkeypatch, f"[print('line', i, flush=True) for i in range(40)]\n{how}")
    outcome, _ = execute(tmp_path, suite)
    assert outcome.state == state
    assert f"exit code {code}" in outcome.metrics["reason"]
    assert outcome.metrics["reason"].endswith("line 39")
    assert "line 24\n" not in outcome.metrics["reason"]


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (WRITE.replace("False", "True") + "sys.exit(1)", "diverged"),
        ("print('pretrain.py: error: no such file'); sys.exit(1)", "refused"),
        (WRITE + "sys.exit(1)", "failed"),
    ],
)
def test_accelerate_makes_every_exit_code_a_1_and_yet_it_is_known_what_happened(
    tmp_path, suite, monkeypatch, code, state
):
    fake_recipe(monkeypatch, code)
    outcome, folder = execute(tmp_path, suite)
    assert outcome.state == state
    assert (folder / "metrics.json").exists() == (state == "diverged"), "a retry would take it for its own"


def test_a_full_disk_ends_the_sweep_and_fails_no_run(tmp_path, study, suite, monkeypatch):
    fake_recipe(monkeypatch, "sys.exit(1)")

    def full(folder):
        raise InputError(f"--output_dir {folder} cannot be written to: no space left on device")

    monkeypatch.setattr(execution, "check_folder", full)
    with pytest.raises(InputError, match="no space left"):
        work(study, Executor(suite, tmp_path / "out", Launch(), "this study"))
    assert set(states(study)) == {"waiting"}


def test_only_a_sound_and_unfinished_checkpoint_is_gone_on_from(tmp_path):
    def checkpoint(step, state=True):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        if state:
            (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 100}))

    assert not can_resume(tmp_path)
    checkpoint(9)
    checkpoint(50, state=False)
    assert can_resume(tmp_path)
    assert not (tmp_path / "checkpoint-50").exists()
    checkpoint(100)
    assert not can_resume(tmp_path)


def test_an_interrupted_run_leaves_no_process(tmp_path, suite, monkeypatch):
    child = "import subprocess; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    fake_recipe(monkeypatch, f"{child}\n(folder / 'up').touch()\ntime.sleep(60)")
    up, stop, found = run_folder(tmp_path / "out", suite.runs()[0]) / "up", threading.Event(), set()
    before = set(psutil.Process().children(recursive=True))

    def interrupt():
        while not up.exists():
            time.sleep(0.05)
        found.update(set(psutil.Process().children(recursive=True)) - before)
        stop.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome, _ = execute(tmp_path, suite, stop)
    thread.join()
    assert outcome is None
    assert len(found) == 2
    _, alive = psutil.wait_procs(found, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_run_that_outlived_its_sweep_is_waited_for(tmp_path, suite, monkeypatch):
    """The run holds the lock of its log, and its result is in the folder."""
    fake_recipe(monkeypatch, WRITE)
    _, folder = execute(tmp_path, suite)
    (folder / "metrics.json").rename(folder / "later.json")
    code = f"import time; time.sleep(1); import os; os.rename('{folder}/later.json', '{folder}/metrics.json')"
    with execution.log_of(folder).open("a") as log:
        assert execution._lock(log, threading.Event())
        orphan = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=log)
    fake_recipe(monkeypatch, "sys.exit('a run was repeated')")
    stopped = threading.Event()
    stopped.set()
    assert execute(tmp_path, suite, stopped)[0] is None
    assert orphan.poll() is None
    assert execute(tmp_path, suite)[0].loss == 1.5
    assert orphan.wait(5) == 0


def test_a_folder_that_takes_no_files_is_an_error():
    with pytest.raises(InputError, match="/dev/full/x cannot be written to"):
        check_folder(Path("/dev/full/x"))


# ---------------------------------------------------------------- the command


QUICK = """
from hf_noneuclid.cli import main
from hf_noneuclid.experiments.sweeping import study
study.HEARTBEAT, study.GRACE = 1, 8  # a worker that was killed is noticed in seconds
main()
"""


def call(folder, text_file, *flags):
    command = [sys.executable, "-c", QUICK, "sweep", f"--suite={folder / 'tiny.yaml'}"]
    command += [f"--output_dir={folder / 'out'}", f"--option=train_files={text_file}", *flags]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=variables, **pipes)


def wait_for(condition, process, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def trained(folder):
    """Each start of a training run writes its log anew; a finished one ends with its loss."""
    return [path for path in (folder / "out" / "runs").glob("*.log") if "Validation loss" in path.read_text()]


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(tmp_path, text_file):
    write(tmp_path, grid=[{"method": "muon", "learning_rate": [1e-3, 1e-1]}])
    killed = call(tmp_path, text_file, "--workers=1")
    runs = tmp_path / "out" / "runs"
    wait_for(lambda: len(list(runs.glob("*.log"))) == 2, killed)
    killed.kill()
    killed.communicate()
    first = {path: path.stat().st_mtime_ns for path in trained(tmp_path)}
    assert len(first) == 1

    again = call(tmp_path, text_file, "--workers=1")
    _, shown = again.communicate(timeout=120)
    assert again.returncode == 0, shown
    assert "2 done, 0 diverged, 0 failed" in shown
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in first.items()), "done runs stay"
    found = results(open_study(tmp_path / "out" / "study.db"))
    assert [result.state for result in found] == ["done"] * 2
    for result in found:
        assert result.loss == result.metrics["eval_loss"]
        assert [row["step"] for row in result.history if "loss" in row] == [1, 2]
        assert result.metrics["steps"] == 2
        assert result.seconds > 1
    assert not list(runs.glob("*/*.safetensors"))


def test_ctrl_c_ends_the_runs_and_gives_them_back(tmp_path, text_file):
    options = {**TINY["options"], "max_steps": 100_000}
    write(tmp_path, grid=[{"method": "muon", "learning_rate": [1e-3]}], options=options)
    process = call(tmp_path, text_file)
    logs = tmp_path / "out" / "runs"
    wait_for(lambda: any("'loss'" in path.read_text() for path in logs.glob("*.log")), process)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "The same command continues the sweep" in shown
    folder = str(logs)
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if any(folder in w for w in p.info["cmdline"] or [])
    ]
    assert [result.state for result in results(open_study(tmp_path / "out" / "study.db"))] == ["waiting"]


def test_bad_input_ends_in_words_before_a_run_starts(tmp_path, capsys):
    write(tmp_path)
    for flags, message in (
        (["--suite=maxi"], "unknown suite 'maxi'"),
        (["--option=max_step=1"], "similar ones are max_steps"),
        (["--option=train_files=/nowhere.txt"], "there is no file /nowhere.txt"),
        (["--option=max_steps"], "expected key=value"),
        (["--workers=0"], "expected an integer of at least 1, not '0'"),
        (["--accelerate_config=none.yaml"], "accelerate configuration none.yaml"),
        (["--output_dir=/proc/nowhere"], "cannot be written to"),
        (["--storage=nodatabase://host/db"], "--storage nodatabase://host/db cannot be used"),
    ):
        with pytest.raises(SystemExit) as caught:
            sweep.main([f"--suite={tmp_path / 'tiny.yaml'}", f"--output_dir={tmp_path / 'out'}", *flags])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "noneuclid sweep: error: " in error
        assert message in error
    assert not (tmp_path / "out" / "runs").exists()


def test_a_suite_that_starts_from_the_default_model_needs_it_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, recipe="classify", options={"use_cpu": True, "max_steps": 2})
    with pytest.raises(SystemExit) as caught:
        sweep.main([f"--suite={path}"])
    assert caught.value.code == 2
    assert "outputs/pretrain, which is not there: run recipes/pretrain.py first" in capsys.readouterr().err
    assert not list(tmp_path.glob("outputs/*/runs"))


SECRET = "a-secret-of-the-environment"


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ["--option=hub_token=quux"]),
        ({}, ["--option=hub_token=9876543210"]),
        ({}, [f"--option=hub_model_id=me/{SECRET}"]),
        ({}, [f"--option=hub_model_id=hf_{'a1' * 12}"]),
        ({"options": {**TINY["options"], "api_key": "quux"}}, []),
        ({"grid": [{**TINY["grid"][0], "options": {"hub_token": ["quux", "corge"]}}]}, []),
        ({"grid": [{**TINY["grid"][0], "options": {"run_name": [f"of {SECRET}"]}}]}, []),
        ({"per_method": {"muon": {"hub_token": "quux"}}}, []),
    ],
)
def test_a_secret_among_the_options_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, changes, flags
):
    monkeypatch.setenv("SOME_PASSWORD", SECRET)
    path, out = write(tmp_path, **changes), tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        sweep.main([f"--suite={path}", f"--output_dir={out}", *flags])
    assert caught.value.code == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert "set HF_TOKEN in the environment" in error
    assert not any(secret in error for secret in ("quux", "corge", "9876543210", "a1a1", SECRET))
    assert not out.exists()
    assert load_suite(write(tmp_path), {"mask_token": "abc", "weight_decay": math.nan})


def dry_run(capsys, folder, *flags):
    sweep.main([f"--suite={folder / 'tiny.yaml'}", f"--output_dir={folder / 'out'}", "--dry_run", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_dry_run_shows_every_command_and_its_cost_and_writes_nothing(tmp_path, capsys, use_cpu):
    write(tmp_path, more_seeds={"seeds": [1]}, options={**TINY["options"], "use_cpu": use_cpu})
    text = dry_run(capsys, tmp_path, "--device_flops=1e9")
    assert text.count("pretrain.py --optim=") == 12
    # Embeddings, one layer, and the last norm.
    parameters = 300 * 16 + 32 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    hours = 6 * parameters * 256 / 1e9 / 3600
    assert f"2 steps of 128 tokens, 256 tokens, {parameters:,} parameters" in text
    assert (f", {hours:.3g} GPU hours" in text) != use_cpu
    assert (f"Expected {6 * hours:.3g} GPU hours" in text) != use_cpu
    assert ("Assumed: 1e+09 FLOP/s" in text) != use_cpu
    assert ("CPU hours are not known until a first run has finished" in text) == use_cpu
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "classify"])
def test_the_dry_run_of_a_cpu_suite_expects_what_its_finished_runs_took(tmp_path, capsys, recipe):
    """A curve without a finished run takes the mean over all runs; one that diverged tells no time."""
    options = {"use_cpu": True, "max_steps": 2}
    grid = [{"method": ["muon", "scion", "adamw_torch"], "learning_rate": [1e-3, 1e-2]}]
    suite = load_suite(write(tmp_path, recipe=recipe, options=options, grid=grid, launch={"threads": 2}))
    path, stop = tmp_path / "out" / "study.db", threading.Event()
    took = [100.0, 300.0, 500.0]

    def execute(run, *_):
        if took:
            return Result(run, "done", loss=1.0, seconds=took.pop(0))
        stop.set()
        return Result(run, "diverged", seconds=7.0)

    work(stored(path, suite), execute, stop=stop)
    before = path.read_bytes()
    text = dry_run(capsys, tmp_path)
    hours = 2 * (2 * (100 + 300) / 2 + 2 * 500 + 2 * (100 + 300 + 500) / 3) / 3600  # of two threads
    assert f"Expected {hours:.3g} CPU hours in the first pass, as 3 finished runs took" in text
    assert "GPU" not in text
    assert "CPU hours are not known" in dry_run(capsys, tmp_path, "--option=max_steps=3"), "another suite"
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["study.db"]


def test_the_dry_run_of_the_paper(capsys):
    sweep.main(["--suite=paper_fineweb_124m", "--dry_run", "--processes=4"])
    text = capsys.readouterr().out
    assert "1,907 steps of 524,288 tokens, 999,817,216 tokens, 124,439,808 parameters" in text
    assert "--num_processes=4" in text
    assert "--gradient_accumulation_steps=32" in text


def installed(kind, folder):
    """The folder to import the package from: the checkout, or the files of a wheel."""
    if kind == "checkout":
        return ROOT
    shutil.copytree(ROOT / "hf_noneuclid", folder / "hf_noneuclid")
    shutil.copytree(ROOT / "recipes", folder / "hf_noneuclid" / "recipes")
    return folder


@pytest.mark.parametrize("kind", ["checkout", "wheel"])
def test_a_dry_run_works_in_an_empty_folder(tmp_path, kind):
    root, empty = installed(kind, tmp_path / "site"), tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "hf_noneuclid", "sweep", "--suite", "mini", "--dry_run"]
    variables = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (script,) = {word for word in done.stdout.split() if word.endswith("pretrain.py")}
    assert Path(script).is_file()
    assert Path(script).is_relative_to(root)
    assert "# 97 runs in the first pass" in done.stdout
    assert not list(empty.iterdir())
