"""One thread for everything: the models are so small that a second one only waits for the first."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, and for the processes that tests start
