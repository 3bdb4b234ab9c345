"""One thread for everything: the models are so small that a second one only waits for the first."""

import gc
import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, and for the processes that tests start

# A busy machine is no failure; a test that hangs meets pytest's timeout.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_collection_finish():
    """Every Trainer collects garbage; looking through all that was imported took most of its time."""
    gc.collect()
    gc.freeze()
