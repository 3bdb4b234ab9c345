"""The pre-training recipe: what it leaves behind, how options reach it, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.optimization import get_wsd_schedule

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import corpus  # noqa: E402
import learning_rates  # noqa: E402
import model as recipe_model  # noqa: E402
import options  # noqa: E402
import packing  # noqa: E402
import pretrain  # noqa: E402
import results  # noqa: E402

TINY = [
    "--use_cpu=true",
    "--config_overrides=n_layer=1,n_embd=16,n_head=2",
    "--vocab_size=300",
    "--block_size=32",
    "--sample_tokens=0",
    "--logging_steps=1",
    "--per_device_train_batch_size=4",
]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """20 kB of lines of words, no two lines alike."""
    words = "the of and king lord land house people unto shall thou ark light day night water über".split()
    generator = np.random.default_rng(0)
    lines = [f"{i} " + " ".join(generator.choice(words, 12)) + "\n" for i in range(350)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory, text_file):
    """A folder that `load_dataset` takes: 350 documents of one line each."""
    folder = tmp_path_factory.mktemp("dataset")
    lines = Path(text_file).read_text(encoding="utf-8").splitlines()
    rows = [json.dumps({"text": line, "id": i}) for i, line in enumerate(lines)]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(folder)


def train(folder, *flags):
    pretrain.main([*TINY, f"--output_dir={folder}", *flags])
    return json.loads((Path(folder) / "metrics.json").read_text())


def history(folder, step):
    return json.loads((Path(folder) / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def mean_loss(model, blocks):
    """Mean of -log p over every token that has one before it, written without the model's own loss."""
    with torch.no_grad():
        logits = model(input_ids=blocks).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), blocks[:, 1:].flatten()).item()


# ---------------------------------------------------------------- results


def test_the_saved_model_has_the_reported_loss(tmp_path, text_file):
    metrics = train(tmp_path, f"--train_files={text_file}", "--max_steps=3", "--eval_blocks=5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = Path(text_file).read_text(encoding="utf-8")
    held_out = text[text.index("\n", int(0.95 * len(text))) + 1 :]
    ids = tokenizer(held_out)["input_ids"] + [tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)

    loss = mean_loss(model, blocks)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    bits = loss / math.log(2) * len(ids) / len(held_out.encode())
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert metrics["corpus"]["validation_blocks"] == len(blocks)

    few = [i * len(blocks) // 5 for i in range(5)]
    assert metrics["eval_loss_along_the_way"] == pytest.approx(mean_loss(model, blocks[few]), rel=1e-5)


def test_the_first_training_loss_is_the_mean_over_the_first_batch(tmp_path, text_file):
    """The Trainer left alone divides GPT-2's loss by one token too many in each sequence."""
    flags = [f"--train_files={text_file}", "--max_steps=1", "--learning_rate=0", "--optim=adamw_torch"]
    metrics = train(tmp_path, *flags, "--per_device_train_batch_size=1000", "--max_steps=1")
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    text = Path(text_file).read_text(encoding="utf-8")
    ids = tokenizer(text[: text.index("\n", int(0.95 * len(text))) + 1])["input_ids"] + [0]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    assert len(blocks) <= 1000
    assert metrics["train_loss"] == pytest.approx(mean_loss(model, blocks), rel=1e-4)


def test_the_embedded_corpus(tmp_path):
    flags = ["--max_steps=2", "--eval_blocks=2", "--max_validation_blocks=4", "--sample_tokens=4"]
    pretrain.main(["--use_cpu=true", f"--output_dir={tmp_path}", *flags])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["tokens"] == 2 * 8 * 256
    assert 4e6 < metrics["parameters"] < 4.5e6
    assert metrics["options"]["optim"] == "muonmax_momo"
    # The text is the same everywhere, and so is the tokenizer made of it.
    assert metrics["corpus"]["train_sha256"].startswith("2c022410b3f12")
    assert metrics["corpus"]["train_tokens"] == 1_010_533
    assert metrics["eval_loss"] < math.log(4096)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not list(tmp_path.glob(".*")), "temporary files stay behind"


def test_the_embedded_corpus_holds_out_whole_chapters():
    loaded = corpus.load_corpus(options.DataArguments(), seed=0)
    train_part, validation = list(loaded.train), list(loaded.validation)
    assert len(train_part) + len(validation) == 1189
    assert not set(train_part) & set(validation)
    assert 0.02 < sum(map(len, validation)) / sum(map(len, train_part)) < 0.04


def test_the_step_size_is_logged_and_drawn(tmp_path, text_file):
    train(tmp_path, f"--train_files={text_file}", "--max_steps=3")
    steps, sizes = results.series(history(tmp_path, 3), "step_size")
    _, rates = results.series(history(tmp_path, 3), "learning_rate")
    assert steps == [1, 2, 3]
    assert all(0 < size <= rate * (1 + 1e-6) for size, rate in zip(sizes, rates, strict=True))


def test_metrics_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    results.write_metrics(path, {"loss": math.nan, "of": [1.0, math.inf]})
    assert json.loads(path.read_text()) == {"loss": None, "of": [1.0, None]}

    def dies_half_way(temporary):
        temporary.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results._write_whole(path, dies_half_way)
    assert json.loads(path.read_text()) == {"loss": None, "of": [1.0, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_seed_gives_the_same_results(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=3"]
    first, again = train(tmp_path / "a", *flags), train(tmp_path / "b", *flags)
    other = train(tmp_path / "c", *flags, "--seed=7")
    for metrics in (first, again, other):
        for key in ("seconds", "command", "options"):
            del metrics[key]
    assert first == again
    assert first["corpus"] == other["corpus"]
    assert first["eval_loss"] != other["eval_loss"]


@pytest.mark.parametrize("optim", ["muonmax", "adamw_torch"])
def test_a_diverged_run_says_so(tmp_path, text_file, optim, capsys):
    flags = [f"--train_files={text_file}", "--max_steps=14", f"--optim={optim}", "--learning_rate=1e30"]
    code = 0
    try:
        train(tmp_path, *flags, "--max_grad_norm=0")
    except SystemExit as error:
        code = error.code
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["diverged"] is True
    assert metrics["eval_loss"] is None
    assert code == (0 if optim == "adamw_torch" else pretrain.EXIT_DIVERGED)
    assert optim == "adamw_torch" or "ten steps in a row" in capsys.readouterr().err


# ---------------------------------------------------------------- resume


def test_resuming_continues_the_same_trajectory(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=6", "--save_steps=3"]
    train(tmp_path / "straight", *flags)
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    (tmp_path / "interrupted").mkdir()
    checkpoint.rename(tmp_path / "interrupted" / "checkpoint-3")

    metrics = train(tmp_path / "interrupted", *flags, "--resume_from_checkpoint=true")
    assert metrics["resumed_from"].endswith("checkpoint-3")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "interrupted")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    elsewhere = train(
        tmp_path / "elsewhere", *flags, f"--resume_from_checkpoint={tmp_path / 'interrupted' / 'checkpoint-3'}"
    )
    assert elsewhere["eval_loss"] == metrics["eval_loss"]


def test_a_stream_resumes_where_it_was(tmp_path, dataset_folder):
    flags = [f"--dataset_name={dataset_folder}", "--streaming", "--validation_documents=20", "--save_steps=2"]
    flags += ["--max_steps=4", "--tokenizer_documents=50"]
    train(tmp_path / "straight", *flags)
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "straight" / "checkpoint-2").rename(tmp_path / "interrupted" / "checkpoint-2")
    train(tmp_path / "interrupted", *flags, "--resume_from_checkpoint=true")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "interrupted")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_overwriting_leaves_no_checkpoint_of_the_old_run(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--save_steps=2", "--eval_strategy=no"]
    train(tmp_path, *flags, "--max_steps=4")
    (tmp_path / "notes.txt").write_text("mine")
    train(tmp_path, *flags, "--max_steps=2", "--overwrite_output_dir")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_can_be_continued_from(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=1", "--learning_rate=0"]
    first = train(tmp_path / "a", *flags)
    continued = [flag for flag in TINY if "overrides" not in flag]
    pretrain.main([*continued, f"--output_dir={tmp_path / 'b'}", *flags, f"--model_name_or_path={tmp_path / 'a'}"])
    second = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("length", [["--max_steps=10"], ["--max_steps=-1", "--num_train_epochs=2"]])
def test_constant_then_linear_down_to_a_tenth(tmp_path, text_file, length):
    flags = [f"--train_files={text_file}", *length, "--learning_rate=0.5", "--optim=sgd", "--save_steps=1.0"]
    batch = 24 if length[0] == "--max_steps=-1" else 4
    steps = train(tmp_path, *flags, f"--per_device_train_batch_size={batch}", "--save_strategy=epoch")["steps"]
    _, rates = results.series(history(tmp_path, steps), "learning_rate")
    constant = steps - round(0.6 * steps)
    assert steps >= 10
    assert len(rates) == steps
    expected = [1.0] * (constant + 1)
    expected += [1 - 0.9 * i / (steps - constant) for i in range(1, steps - constant)]
    assert rates == pytest.approx([0.5 * part for part in expected])
    assert rates[-1] - 0.5 * 0.9 / (steps - constant) == pytest.approx(0.05)  # where the next step would be


def test_options_of_the_schedule_win(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=6", "--learning_rate=1", "--optim=sgd"]
    train(tmp_path, *flags, '--lr_scheduler_kwargs={"num_decay_steps": 2, "min_lr_ratio": 0.5}')
    _, rates = results.series(history(tmp_path, 6), "learning_rate")
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75])


def test_a_warm_up_shortens_the_constant_part_then_the_decay(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=6", "--learning_rate=1", "--optim=sgd"]
    train(tmp_path, *flags, "--warmup_steps=4", "--decay_fraction=1.0")
    _, rates = results.series(history(tmp_path, 6), "learning_rate")
    assert rates[4:] == pytest.approx([1, 0.55])


# ---------------------------------------------------------------- packing


@pytest.fixture(scope="module")
def tokenizer():
    return recipe_model.train_tokenizer(["the king of the land\n", "and the people"] * 3, 280, 8)


DOCUMENTS = ["the king\n", "", "of the land and the people of the land", "a", "über alles\nthe end"]


def test_packing_loses_nothing_but_the_last_partial_block(tokenizer):
    ids = [i for text in DOCUMENTS if text for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for block_size in (1, 3, 8):
        blocks = packing.pack(corpus.Documents(DOCUMENTS), tokenizer, block_size)
        rows = np.stack(list(blocks.dataset["input_ids"]))
        assert rows.flatten().tolist() == ids[: len(ids) // block_size * block_size]
        assert blocks.tokens == len(ids)
        assert blocks.utf8_bytes == len("".join(DOCUMENTS).encode())


def test_a_limit_keeps_tokens_and_bytes_of_what_was_read(tokenizer):
    blocks = packing.pack(corpus.Documents(DOCUMENTS), tokenizer, 3, limit=1)
    assert len(blocks.dataset) == 1
    assert blocks.utf8_bytes == len(DOCUMENTS[0].encode())
    assert blocks.tokens == len(tokenizer(DOCUMENTS[0])["input_ids"]) + 1


@pytest.mark.parametrize("streaming", [False, True])
def test_lazy_packing_gives_the_same_blocks(tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"body": DOCUMENTS})
    documents = corpus.Documents(rows.to_iterable_dataset() if streaming else rows, "body")
    lazy = packing.pack_lazily(documents, tokenizer, 3).dataset
    assert isinstance(lazy, datasets.IterableDataset) == streaming
    expected = packing.pack(corpus.Documents(DOCUMENTS), tokenizer, 3).dataset
    assert [list(row["input_ids"]) for row in lazy] == [list(row["input_ids"]) for row in expected]


def test_long_documents_are_cut_at_line_ends_only(tokenizer, monkeypatch):
    text = "the king\nof the land\n\nand the people of a long line without end\nthe end"
    whole = packing.pack(corpus.Documents([text]), tokenizer, 2)
    monkeypatch.setattr(packing, "PIECE", 4)
    assert [piece for piece, _ in packing._pieces(text)] == text.splitlines(keepends=True)[:2] + [
        "\nand the people of a long line without end\n",
        "the end",
    ]
    cut = packing.pack(corpus.Documents([text]), tokenizer, 2)
    assert (cut.tokens, cut.utf8_bytes) == (whole.tokens, whole.utf8_bytes)


def test_every_document_end_counts_in_the_hash(tokenizer):
    hashes = {packing.pack(corpus.Documents(texts), tokenizer, 1).sha256 for texts in (["ab"], ["a", "b"], ["b", "a"])}
    assert len(hashes) == 3


def test_a_tokenizer_trained_here_gives_any_text_back(tokenizer):
    text = "Never seen: ∑ 字 \x00 \t  two  spaces\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
