"""What the recipes raise; apart from options.py, whose imports take seconds."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""
