"""Starts several processes, and ends them."""

import os
import signal
import subprocess
import sys

import pytest

TIMEOUT = 150


def launch(*command, timeout=TIMEOUT, killed=False, **environment):
    """Runs a command to its end, and returns its log; if it fails or takes too long, that is the error.

    Args:
        command: What to run.
        timeout: Seconds, after which a rank is taken to hang.
        killed: It is supposed to fail, because one of its workers is killed.
        environment: Variables to set.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            **environment,
        },
    )
    try:
        log, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        log = stop(process)
        pytest.fail(f"no end after {timeout} s:\n{log}", pytrace=False)
    if bool(process.returncode) != killed or (killed and "SIGKILL" not in log):
        pytest.fail(f"exit code {process.returncode}:\n{log}", pytrace=False)
    return log


def torchrun(script, *arguments, ranks=2, **options):
    """Runs a script on several ranks of this machine."""
    return launch(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
        *(str(script), *map(str, arguments)),
        **options,
    )


def stop(process):
    """Ends a launcher and its workers; the log so far.

    The workers lead sessions of their own, so the launcher is asked to end them before it is killed.
    """
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=40)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]
