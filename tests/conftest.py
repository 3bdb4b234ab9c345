"""One thread a process: the models are so small that a second one only waits for the first.

``pytest`` alone shares the files of the suite among processes. Everything else runs in one process: files or
tests that are named, other markers (the distributed tests start processes themselves), ``-s`` and ``--pdb``.
"""

import gc
import os

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, and for the processes that tests start

# A busy machine is no failure; a test that hangs meets pytest's timeout.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.hookimpl(tryfirst=True)  # before that of pytest-xdist, which reads the options
def pytest_cmdline_main(config):
    """Runs the whole suite in two to four processes, if pytest-xdist is there; ``-n 0`` keeps it in one."""
    if hasattr(config, "workerinput"):  # in one of these processes, which must not start others
        return
    options = config.option
    alone = options.usepdb or options.capture == "no" or options.markexpr != "not distributed and not clients"
    processes = min(os.cpu_count() or 1, 4)
    if (
        config.pluginmanager.hasplugin("xdist")
        and options.numprocesses is None
        and config.args_source == pytest.Config.ArgsSource.TESTPATHS
        and not alone
        and processes > 1
    ):
        options.numprocesses, options.dist = processes, "loadfile"


def pytest_collection_finish():
    """Every Trainer collects garbage; looking through all that was imported took most of its time."""
    gc.collect()
    gc.freeze()
