"""The embedded data: docstrings of the installed torch and transformers, read without importing anything."""

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
from tqdm import tqdm

from hf_noneuclid.experiments.common import InputError

LIBRARIES = ("torch", "transformers")
LICENSE = "torch: BSD-3-Clause; transformers: Apache-2.0"
SHORTEST = 80  # characters; what is shorter says little
HELD_OUT_EVERY = 10  # files
CHARACTERS = 700_000  # of each library: parsing all of their 100 MB would take longer than the training

Row = dict[str, str]


def read_docstrings() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return rows of `text` and `label`, the library, to train on and held out.

    Files are held out, not docstrings, and what stands in a file trained on is held out nowhere. The same
    versions of the libraries give the same rows.

    Raises:
        InputError: a library is not installed as Python files.
    """
    train: dict[str, Row] = {}
    held_out: dict[str, Row] = {}
    for library in LIBRARIES:
        for is_held_out, text in _docstrings(library):
            (held_out if is_held_out else train).setdefault(text, {"text": text, "label": library})
    unseen = [row for text, row in held_out.items() if text not in train]
    return _mixed(list(train.values())), _mixed(unseen)


def _mixed(rows: list[Row]) -> datasets.Dataset:
    """Return the rows in an order in which any beginning holds both libraries."""
    return datasets.Dataset.from_list(rows).shuffle(seed=0)


def _docstrings(library: str) -> Iterator[tuple[bool, str]]:
    """Yield docstrings, and whether their file is held out, until there are characters enough."""
    left = CHARACTERS
    title = f"Reading docstrings of {library}"
    with tqdm(total=left, desc=title, unit="char", unit_scale=True, disable=None) as bar:
        for path, digest in _files(library):
            for text in docstrings_of(path):
                yield int(digest[-8:], 16) % HELD_OUT_EVERY == 0, text
                left -= len(text)
                bar.update(len(text))
            if left <= 0:
                return


def _files(library: str) -> list[tuple[Path, str]]:
    """Return the Python files in an order that mixes the folders and is the same everywhere."""
    package = importlib.util.find_spec(library)
    if package is None or package.origin is None:
        raise InputError(f"the embedded docstrings need {library}: pip install {library}, or give a dataset")
    root = Path(package.origin).parent
    names = {
        path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
        for path in root.rglob("*.py")
    }
    return sorted(names.items(), key=lambda item: item[1])


def docstrings_of(path: Path) -> list[str]:
    """Return the docstrings of a file that are long enough, in its order; [] if it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of other people's escape sequences
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text and len(text) > SHORTEST]
