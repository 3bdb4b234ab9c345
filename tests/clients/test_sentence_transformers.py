"""sentence-transformers, with a loss of each of its kinds."""

import random

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from common import WORDS, Record, arguments, build, counting, every_method_and_rate, tokenizer
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Pooling, Transformer
from transformers import BertModel

import hf_noneuclid  # noqa: F401  (its methods by name)

pytestmark = pytest.mark.clients


def sentence_model(folder):
    build(BertModel, "bert").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = Transformer(str(folder), max_seq_length=32)
    return SentenceTransformer(modules=[words, Pooling(words.get_word_embedding_dimension())], device="cpu")


def anchored(i):
    """What comes soon after it belongs to the anchor."""
    return {"anchor": counting(i, 6), "positive": counting(i + 3, 6)}


def compared(i):
    """Two texts are alike if their words come from the same fifth of the list."""
    chance = random.Random(i)
    topics = [chance.randrange(5), chance.randrange(5)]
    topics[1] = topics[0] if i % 2 else topics[1]
    texts = [" ".join(WORDS[8 * topic + chance.randrange(8)] for _ in range(8)) for topic in topics]
    return {"sentence1": texts[0], "sentence2": texts[1], "score": float(topics[0] == topics[1])}


@pytest.mark.parametrize(
    ("loss", "example", "fell_to"),
    [
        (losses.MultipleNegativesRankingLoss, anchored, 0.9),
        (losses.CosineSimilarityLoss, compared, 0.3),
        (losses.CoSENTLoss, compared, 0.4),
    ],
)
@every_method_and_rate
def test_sentences_are_embedded(tmp_path, loss, example, fell_to, method, rate):
    model, record = sentence_model(tmp_path / "model"), Record()
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments(tmp_path, method, rate)),
        train_dataset=Dataset.from_list([example(i) for i in range(2000)]),
        loss=loss(model),
        callbacks=[record],
    ).train()
    record.check(rate, fell_to)
