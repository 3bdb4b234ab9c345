"""The text of the recipes: parts that do not overlap, and blocks that lose nothing."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.training import packing
from hf_noneuclid.experiments.training.arguments import DataArguments
from hf_noneuclid.experiments.training.data import Documents, load_corpus
from hf_noneuclid.experiments.training.model import train_tokenizer

DOCUMENTS = ["the king\n", "", "of the land and the people of the land", "a", "über alles\nthe end"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the king of the land\n", "and the people"] * 3, 280, 8)


def test_the_embedded_corpus_holds_out_whole_chapters():
    loaded = load_corpus(DataArguments(), seed=0)
    train_part, validation = list(loaded.train), list(loaded.validation)
    assert len(train_part) + len(validation) == 1189
    assert not set(train_part) & set(validation)
    assert 0.02 < sum(map(len, validation)) / sum(map(len, train_part)) < 0.04


def test_a_file_is_cut_at_a_line_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    loaded = load_corpus(DataArguments(train_files=[str(tmp_path / "a.txt")]), seed=0)
    (train,), (validation,) = loaded.train, loaded.validation
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.02 < len(validation) / len(text) < 0.06


def test_validation_files_leave_the_training_files_whole(tmp_path):
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(f"\ufeffthe text of {name}", encoding="utf-8")
    files = {"train_files": [str(tmp_path / "a.txt")], "validation_files": [str(tmp_path / "b.md")]}
    loaded = load_corpus(DataArguments(**files), seed=0)
    assert [*loaded.train, *loaded.validation] == ["the text of a.txt", "the text of b.md"]


WRITERS = {
    "json": lambda rows, path: rows.to_json(path, lines=False),
    "jsonl": datasets.Dataset.to_json,
    "csv": datasets.Dataset.to_csv,
    "parquet": datasets.Dataset.to_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_each_row_of_a_file_with_columns_is_a_document(tmp_path, kind):
    texts, path = [f"first, {i}\nsecond" for i in range(40)], str(tmp_path / f"a.{kind}")
    WRITERS[kind](datasets.Dataset.from_dict({"id": range(40), "body": texts}), path)
    loaded = load_corpus(DataArguments(train_files=[path], text_column="body"), seed=0)
    assert list(loaded.validation) == [texts[0], texts[20]]
    assert list(loaded.train) == [*texts[1:20], *texts[21:]]
    both = DataArguments(train_files=[path, path], validation_files=[path], text_column="body")
    loaded = load_corpus(both, seed=0)
    assert [*loaded.train, *loaded.validation] == texts * 3
    with pytest.raises(InputError, match=r"no column 'text'; --text_column is one of: id, body"):
        load_corpus(DataArguments(train_files=[path]), seed=0)


@pytest.mark.parametrize("names", [["a.pdf"], ["a"], ["a.txt", "b.jsonl"], ["a.csv", "b.parquet"]])
def test_files_of_another_kind_or_of_several_are_refused(tmp_path, names):
    paths = [str(tmp_path / name) for name in names]
    for path in paths:
        Path(path).write_text("text\n")
    with pytest.raises(InputError, match=r"one kind, one of \.json, \.jsonl, \.csv, \.parquet, \.txt, \.md"):
        load_corpus(DataArguments(train_files=paths), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_validation_split_holds_out_its_first_documents(tmp_path, streaming):
    lines = "".join(f'{{"body": "text {i}"}}\n' for i in range(10))
    (tmp_path / "train.jsonl").write_text(lines)
    options_ = {"dataset_name": str(tmp_path), "text_column": "body", "validation_documents": 3}
    loaded = load_corpus(DataArguments(**options_, streaming=streaming), seed=0)
    assert list(loaded.validation) == ["text 0", "text 1", "text 2"]
    assert sorted(loaded.train) == [f"text {i}" for i in range(3, 10)]
    assert (list(loaded.train) == sorted(loaded.train)) != streaming, (
        "a stream is shuffled, the Trainer does the rest"
    )


def test_a_dataset_with_a_validation_split(tmp_path_factory):
    folder = tmp_path_factory.mktemp(
        "splits"
    )  # tmp_path has "test" in its name, which datasets take for a split
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(f'{{"text": "of {split}"}}\n' * 2)
    loaded = load_corpus(DataArguments(dataset_name=str(folder), validation_split="validation"), seed=0)
    assert [*loaded.train, *loaded.validation] == ["of train"] * 2 + ["of validation"] * 2


def test_packing_loses_nothing_but_the_last_partial_block(tokenizer):
    ids = [i for text in DOCUMENTS if text for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for block_size in (1, 3, 8):
        blocks = packing.pack(Documents(DOCUMENTS), tokenizer, block_size)
        rows = np.stack(list(blocks.dataset["input_ids"]))
        assert rows.flatten().tolist() == ids[: len(ids) // block_size * block_size]
        assert blocks.tokens == len(ids)
        assert blocks.utf8_bytes == len("".join(DOCUMENTS).encode())


def test_a_limit_keeps_tokens_and_bytes_of_what_was_read(tokenizer):
    blocks = packing.pack(Documents(DOCUMENTS), tokenizer, 3, limit=1)
    assert len(blocks.dataset) == 1
    assert blocks.utf8_bytes == len(DOCUMENTS[0].encode())
    assert blocks.tokens == len(tokenizer(DOCUMENTS[0])["input_ids"]) + 1


@pytest.mark.parametrize("streaming", [False, True])
def test_lazy_packing_gives_the_same_blocks(tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"body": DOCUMENTS})
    documents = Documents(rows.to_iterable_dataset() if streaming else rows, "body")
    lazy = packing.pack_lazily(documents, tokenizer, 3).dataset
    assert isinstance(lazy, IterableDataset) == streaming
    expected = packing.pack(Documents(DOCUMENTS), tokenizer, 3).dataset
    assert [list(row["input_ids"]) for row in lazy] == [list(row["input_ids"]) for row in expected]


def test_a_stream_is_shuffled_anew_in_each_epoch(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [f"{i} king" for i in range(50)]}).to_iterable_dataset()
    stream = packing.pack_lazily(
        Documents(rows.shuffle(seed=0, buffer_size=50), "text"), tokenizer, 8
    ).dataset
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append([row["input_ids"] for row in stream])
    assert epochs[0] == epochs[2] != epochs[1]


def test_loader_processes_share_the_documents_of_a_stream(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [f"{i:02} king of the land" for i in range(20)]})
    documents = Documents(rows.to_iterable_dataset(num_shards=2), "text")
    stream = packing.pack_lazily(documents, tokenizer, 1).dataset
    batches = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=packing.collate)
    seen = [batch["input_ids"].item() for batch in batches]
    assert sorted(seen) == sorted(row["input_ids"][0] for row in stream)


def test_long_documents_are_cut_at_line_ends_only(tokenizer, monkeypatch):
    text = "the king\nof the land\n\nand the people of a long line without end\nthe end"
    whole = packing.pack(Documents([text]), tokenizer, 2)
    monkeypatch.setattr(packing, "PIECE", 4)
    lines = ["the king\n", "of the land\n", "\nand the people of a long line without end\n", "the end"]
    assert [piece for piece, _ in packing._pieces(text)] == lines
    cut = packing.pack(Documents([text]), tokenizer, 2)
    assert (cut.tokens, cut.utf8_bytes) == (whole.tokens, whole.utf8_bytes)


def test_the_first_token_of_a_block_is_no_target():
    batch = packing.collate([{"input_ids": np.array([5, 6, 7], np.int32)}, {"input_ids": [1, 2, 3]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 2, 3]]


def test_the_blocks_evaluated_while_training_are_spread_evenly():
    rows = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(10)]})
    assert packing.spread(rows, 4)["input_ids"] == [[0], [2], [5], [7]]
    assert packing.spread(rows, 99)["input_ids"] == rows["input_ids"]


def test_every_document_end_counts_in_the_hash(tokenizer):
    hashes = {
        packing.pack(Documents(texts), tokenizer, 1).sha256 for texts in (["ab"], ["a", "b"], ["b", "a"])
    }
    assert len(hashes) == 3


def test_a_tokenizer_trained_here_gives_any_text_back(tokenizer):
    text = "Never seen: ∑ 字 \x00 \t  two  spaces\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
