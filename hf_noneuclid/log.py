"""Showing what the package logs."""

from __future__ import annotations

import logging
import os


def show_log() -> None:
    """Prints the package's log from level INFO on to stderr, on rank 0; may be called again.

    The table of what is stepped as a matrix is logged at INFO, which few scripts show.
    """
    logger = logging.getLogger("hf_noneuclid")
    if os.environ.get("RANK", "0") != "0" or logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the script may print the root logger's records as well
