"""Which model a training starts from, as metrics.json keeps it."""

from pathlib import Path
from typing import Any


def describe_base(
    name: str | None, revision: str | None = None, package: str | None = None, gguf_file: str | None = None
) -> dict[str, Any] | None:
    """Return what a training starts from; decided while it runs, since later the folders may be others.

    Args:
        name: Hub name or folder of the checkpoint; None from scratch.
        revision: branch, tag or commit of a model on the Hub.
        package: the Python package that holds the checkpoint, which then is its name.
        gguf_file: of the checkpoint.

    Returns:
        The same, and `on_hub`: whether others can load it by its name. None from scratch.
    """
    if name is None:
        return None
    on_hub = package is None and not Path(name).exists()
    return {
        "name": package or name,
        "on_hub": on_hub,
        "revision": revision if on_hub else None,
        "package": package,
        "gguf_file": gguf_file,
    }
