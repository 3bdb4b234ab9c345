"""What the recipes raise; apart from options.py, whose imports take seconds."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""


class DivergedError(RuntimeError):
    """The training cannot go on: loss or gradients stay NaN or infinite."""


class PushError(RuntimeError):
    """Results are on disk but not on the Hub; the message says how to push them later."""
