"""The value of --optim_args, which the Trainer takes as one text."""


def option_pairs(text: str | None) -> dict[str, str]:
    """Return the options in a value of --optim_args, as text; none if it is not given."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    return {name.strip(): value.strip() for name, _, value in pairs}
