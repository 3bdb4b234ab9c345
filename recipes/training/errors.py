"""What the recipes raise and exit with; apart from options.py, whose imports take seconds."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the exit code of a script says, where it is not 0."""

    FAILED = 1  # a training run of several did, or, as for every Python script, there is a traceback
    BAD_INPUT = 2  # argparse's own
    DIVERGED = 3
    NOT_PUSHED = 4  # the results are on disk
    INTERRUPTED = 130  # a shell's, for Ctrl-C


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""


class PushError(RuntimeError):
    """Results are on disk but not on the Hub; the message says how to push them later."""
