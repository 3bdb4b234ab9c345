"""The other embedded task of classification: is a text a docstring, or a verse of the pre-training corpus?"""

import datasets

from hf_noneuclid.experiments.finetuning.docstrings import SHORTEST, read_docstrings
from hf_noneuclid.experiments.training.corpus import Documents, load_corpus
from hf_noneuclid.experiments.training.options import DataArguments


def read_domains() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return rows of `text` and `label`, docstring or verse, to train on and held out, as many of each.

    Verses are held out by chapters, docstrings by files.

    Raises:
        InputError: the embedded corpus or a library is not installed.
    """
    corpus = load_corpus(DataArguments(), seed=0)
    train, held_out = read_docstrings()
    return _with_verses(train, corpus.train), _with_verses(held_out, corpus.validation)


def _with_verses(docstrings: datasets.Dataset, chapters: Documents) -> datasets.Dataset:
    verses = [verse for chapter in chapters for verse in chapter.splitlines() if len(verse) > SHORTEST]
    chosen = datasets.Dataset.from_dict({"text": verses}).shuffle(seed=0)[: len(docstrings)]["text"]
    texts = [*docstrings["text"], *chosen]
    labels = ["docstring"] * len(docstrings) + ["verse"] * len(chosen)
    return datasets.Dataset.from_dict({"text": texts, "label": labels}).shuffle(seed=0)
