"""The pre-training recipe: what it leaves behind, how options reach it, and what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import digits
import numpy as np
import pretrain
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments

from hf_noneuclid.experiments import common
from hf_noneuclid.experiments.common import ExitCode, InputError, series, write_whole
from hf_noneuclid.experiments.training import results
from hf_noneuclid.experiments.training.masked import MaskingCollator
from hf_noneuclid.experiments.training.model import train_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, parse
from hf_noneuclid.experiments.training.packing import IGNORED

RECIPES = Path(__file__).parents[1] / "recipes"

TINY = [
    "--use_cpu=true",
    "--config_overrides=n_layer=1,n_embd=16,n_head=2",
    "--vocab_size=300",
    "--block_size=32",
    "--sample_tokens=0",
    "--logging_steps=1",
    "--per_device_train_batch_size=4",
    "--eval_steps=0.999",
]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """20 kB of lines of words, no two lines alike."""
    words = ["the", "of", "and", "king", "land", "house", "people", "unto", "shall", "ark", "light", "über"]
    generator = np.random.default_rng(0)
    lines = [f"{i} " + " ".join(generator.choice(words, 14)) + "\n" for i in range(350)]
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
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), blocks[:, 1:].flatten()).item()


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


@pytest.mark.parametrize(
    ("optim", "options", "rate", "limited"),
    [
        ("muon", "step_size=momo,loss_lower_bound=0.0", 1e-6, 5),
        ("muon", "step_size=momo,loss_lower_bound=0.0", 1e3, 0),
        ("muon", "step_size=rate", 1e-6, None),
        ("adamw_torch", "", 1e-6, None),
    ],
)
def test_metrics_count_the_steps_that_the_learning_rate_limited(
    tmp_path, text_file, optim, options, rate, limited
):
    """Those after the last log, too."""
    flags = [f"--train_files={text_file}", "--max_steps=5", "--logging_steps=2", f"--optim={optim}"]
    metrics = train(tmp_path, *flags, f"--optim_args={options}", f"--learning_rate={rate}")
    assert metrics["limited_steps"] == limited


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
    flags = ["--max_steps=3", "--eval_steps=1", "--eval_blocks=2", "--max_validation_blocks=4"]
    pretrain.main(["--use_cpu=true", f"--output_dir={tmp_path}", *flags, "--sample_tokens=4"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["tokens"] == 3 * 8 * 256
    assert 4e6 < metrics["parameters"] < 4.5e6
    assert metrics["options"]["optim"] == "muonmax_momo"
    # The text is the same everywhere, and so is the tokenizer made of it.
    assert metrics["corpus"]["train_sha256"].startswith("2c022410b3f12")
    assert metrics["corpus"]["train_tokens"] == 1_010_533
    # The first steps are tiny: they lower the loss, and do not yet leave the uniform distribution.
    _, (*before, last) = series(json.loads((tmp_path / "history.json").read_text()), "eval_loss")
    assert len(before) >= 2
    assert last < before[1] < before[0]
    assert metrics["eval_loss"] == pytest.approx(math.log(4096), abs=0.2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not list(tmp_path.glob(".*")), "temporary files stay behind"


def test_the_embedded_docstrings(tmp_path):
    metrics = train(tmp_path, "--embedded_text=docstrings", "--max_steps=1", "--max_validation_blocks=4")
    assert metrics["corpus"]["name"] == "docstrings of torch and transformers"
    assert metrics["corpus"]["train_tokens"] > 100_000


def test_the_commit_of_a_checkout_is_recorded(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words], check=True
        )

    monkeypatch.setattr(common, "__file__", str(tmp_path / "package" / "experiments" / "common.py"))
    assert common.describe_commit() == {}
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "First")
    first = common.describe_commit()["commit"]
    assert (len(first["id"]), first["clean"]) == (40, True)
    (tmp_path / "new.py").touch()
    assert common.describe_commit()["commit"] == {**first, "clean": False}


# ---------------------------------------------------------------- hidden tokens, summed losses, peers

BERT = [
    "--task=masked_lm",
    "--model_type=bert",
    "--config_overrides=hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2",
]


def test_a_masked_model_learns_the_hidden_tokens(tmp_path, text_file):
    metrics = train(tmp_path, f"--train_files={text_file}", *BERT, "--max_steps=2", "--optim=muon")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_token_id is not None
    assert metrics["bits_per_byte"] is None
    text = Path(text_file).read_text(encoding="utf-8")
    ids = tokenizer(text[text.index("\n", int(0.95 * len(text))) + 1 :])["input_ids"] + [
        tokenizer.eos_token_id
    ]
    rows = [{"input_ids": ids[i : i + 32]} for i in range(0, len(ids) // 32 * 32, 32)]
    batch = MaskingCollator(tokenizer)(rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    hidden = batch["labels"] != IGNORED
    loss = cross_entropy(logits[hidden].double(), batch["labels"][hidden]).item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_what_is_hidden_depends_on_the_block_alone(tmp_path):
    tokenizer = train_tokenizer(["the king of the land"] * 9, 300, 200, "<|mask|>")
    collator, generator = MaskingCollator(tokenizer), torch.Generator().manual_seed(0)
    blocks = torch.randint(2, 300, (60, 200), generator=generator)
    rows = [{"input_ids": block.numpy()} for block in blocks]
    batch, alone = collator(rows), collator(rows[7:8])
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][7], alone[name][0])
    chosen = batch["labels"] != IGNORED
    assert (chosen.sum(dim=1) == 30).all()
    assert torch.equal(batch["labels"][chosen], blocks[chosen])
    assert torch.equal(batch["input_ids"][~chosen], blocks[~chosen])
    shown = batch["input_ids"][chosen]
    assert ((shown == tokenizer.mask_token_id).float().mean() - 0.8).abs() < 0.01
    assert 0.08 < ((shown != tokenizer.mask_token_id) & (shown != blocks[chosen])).float().mean() < 0.12
    with pytest.raises(InputError, match="no mask_token"):
        MaskingCollator(train_tokenizer(["words"], 300, 100))


def test_a_loss_summed_over_tokens_is_that_many_times_the_mean(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=1", "--learning_rate=0", "--optim=adamw_torch"]
    runs = [train(tmp_path / how, *flags, f"--loss_reduction={how}") for how in ("mean", "sum")]
    mean, summed = (run["train_loss"] for run in runs)
    assert summed == pytest.approx(4 * 31 * mean, rel=1e-4)
    assert runs[0]["eval_loss"] == pytest.approx(runs[1]["eval_loss"], rel=1e-6)


def test_prodigy_trains_as_a_peer(tmp_path, text_file):
    prodigyopt = pytest.importorskip("prodigyopt")
    flags = ["--peer=prodigy", "--learning_rate=1", "--adam_beta2=0.9", "--max_steps=3"]
    trainer = caught(pretrain, tmp_path, f"--train_files={text_file}", *flags)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, prodigyopt.Prodigy)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert trainer.args.method == "prodigy"


def test_momo_adam_gets_the_loss_of_every_step(tmp_path, text_file, monkeypatch):
    momo = pytest.importorskip("momo")
    losses, step = [], momo.MomoAdam.step
    monkeypatch.setattr(
        momo.MomoAdam, "step", lambda self, loss: losses.append(float(loss)) or step(self, loss=loss)
    )
    flags = ["--peer=momo_adam", "--learning_rate=1e-2", "--max_steps=3", "--gradient_accumulation_steps=2"]
    trainer = caught(pretrain, tmp_path, f"--train_files={text_file}", *flags)
    logged = series(trainer.state.log_history, "loss")[1]
    assert losses == pytest.approx(logged, rel=1e-3)


def caught(recipe, folder, *flags):
    """The Trainer of a run of a recipe."""
    trainers, init = [], recipe.RecipeTrainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recipe.RecipeTrainer, "__init__", lambda self, **k: trainers.append(self) or init(self, **k)
        )
        train(folder, *flags)
    return trainers[0]


def test_warm_up_in_parts_is_a_number_of_steps():
    """Schedule-Free reads it as a number."""
    assert parsed("--warmup_steps=0.1", "--max_steps=45")[2].warmup_steps == 5


def test_digits_are_learnt(tmp_path):
    shared = ["--use_cpu=true", "--hidden_size=16", "--layers=1", f"--output_dir={tmp_path}"]
    digits.main([*shared, "--max_steps=60", "--optim=muon", "--learning_rate=0.02"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] < 1.8
    assert metrics["accuracy"] > 0.4
    assert metrics["steps"] == 60


def test_the_step_size_is_logged_and_drawn(tmp_path, text_file):
    train(tmp_path, f"--train_files={text_file}", "--max_steps=3")
    steps, sizes = series(history(tmp_path, 3), "step_size")
    _, rates = series(history(tmp_path, 3), "learning_rate")
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
        write_whole(path, dies_half_way)
    assert json.loads(path.read_text()) == {"loss": None, "of": [1.0, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_seed_gives_the_same_results(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=3"]
    first = train(tmp_path / "a", *flags)
    torch.rand(5)  # what the process did before must not matter
    again = train(tmp_path / "b", *flags)
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
        train(tmp_path, *flags, "--max_grad_norm=0", "--sample_tokens=3")
    except SystemExit as error:
        code = error.code
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["diverged"] is True
    assert metrics["eval_loss"] is None
    assert metrics["diverged_at"] in range(1, 5)
    assert code == (0 if optim == "adamw_torch" else ExitCode.DIVERGED)
    assert optim == "adamw_torch" or "ten steps in a row" in capsys.readouterr().err


# ---------------------------------------------------------------- resume


def test_resuming_continues_the_same_trajectory(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=6", "--save_steps=3"]
    train(tmp_path / "straight", *flags)
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    (tmp_path / "interrupted").mkdir()
    checkpoint.rename(tmp_path / "interrupted" / "checkpoint-3")

    flags += [
        "--seed=7",
        "--data_seed=42",
    ]  # other weights at the start: only the checkpoint's can end the same
    metrics = train(tmp_path / "interrupted", *flags, "--resume_from_checkpoint=true")
    assert metrics["resumed_from"].endswith("checkpoint-3")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "interrupted")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    elsewhere = train(
        tmp_path / "elsewhere",
        *flags,
        f"--resume_from_checkpoint={tmp_path / 'interrupted' / 'checkpoint-3'}",
    )
    assert elsewhere["eval_loss"] == metrics["eval_loss"]


def test_a_stream_resumes_where_it_was(tmp_path, dataset_folder):
    flags = [f"--dataset_name={dataset_folder}", "--streaming", "--validation_documents=20", "--save_steps=2"]
    flags += ["--max_steps=4", "--tokenizer_documents=50"]
    train(tmp_path / "straight", *flags)
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "straight" / "checkpoint-2").rename(tmp_path / "interrupted" / "checkpoint-2")
    flags += ["--seed=7", "--data_seed=42"]
    train(tmp_path / "interrupted", *flags, "--resume_from_checkpoint=true")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "interrupted")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def damage(checkpoint, how):
    """What a kill in the middle of a save leaves: everything but the Trainer's state, or half of it."""
    state = checkpoint / "trainer_state.json"
    text = state.read_text()
    state.unlink()
    if how == "truncated":
        state.write_text(text[: len(text) // 2])


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_checkpoint_not_written_to_the_end_is_skipped(tmp_path, text_file, how, caplog, capsys):
    flags = [f"--train_files={text_file}", "--max_steps=4", "--save_steps=2"]
    straight = train(tmp_path, *flags)
    (tmp_path / "metrics.json").unlink()
    damage(tmp_path / "checkpoint-4", how)
    with pytest.raises(SystemExit):
        train(tmp_path, *flags, f"--resume_from_checkpoint={tmp_path / 'checkpoint-4'}")
    assert "no trainer_state.json that can be read" in capsys.readouterr().err
    resumed = train(tmp_path, *flags, "--resume_from_checkpoint=true")
    assert "checkpoint-4 was not written to the end" in caplog.text
    assert resumed["resumed_from"].endswith("checkpoint-2")
    assert resumed["eval_loss"] == straight["eval_loss"]
    for step in (2, 4):
        damage(tmp_path / f"checkpoint-{step}", how)
    with pytest.raises(SystemExit):
        train(tmp_path, *flags, "--resume_from_checkpoint=true")
    assert "was written to the end, not even checkpoint-2" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_further(tmp_path, text_file, capsys):
    for length in (["--max_steps=2"], ["--max_steps=-1", "--num_train_epochs=1", "--save_strategy=epoch"]):
        flags = [f"--train_files={text_file}", *length, "--per_device_train_batch_size=300"]
        train(tmp_path / length[0], *flags)
        with pytest.raises(SystemExit):
            train(tmp_path / length[0], *flags, "--resume_from_checkpoint=true")
        assert "steps are done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "length", [["--max_steps=2"], ["--max_steps=-1", "--num_train_epochs=1", "--save_strategy=epoch"]]
)
def test_a_run_killed_after_its_last_step_writes_its_results(tmp_path, text_file, length):
    flags = [f"--train_files={text_file}", *length, "--per_device_train_batch_size=100"]
    straight = train(tmp_path, *flags)
    saved = weights(tmp_path)
    for name in ("metrics.json", "history.json", "curves.png", "model.safetensors"):
        (tmp_path / name).unlink()
    resumed = train(tmp_path, *flags, "--resume_from_checkpoint=true")
    for metrics in (straight, resumed):
        for key in ("seconds", "command", "options", "resumed_from", "commit"):
            del metrics[key]
    assert resumed == straight
    assert resumed["train_loss"] > 1
    again = weights(tmp_path)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    rows = json.loads((tmp_path / "history.json").read_text())
    assert not [row for row in rows if row.get("train_loss") == 0]


def test_results_of_an_earlier_end_do_not_count(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--lr_scheduler_type=constant"]
    train(tmp_path, *flags, "--max_steps=2")
    early = (tmp_path / "metrics.json").read_bytes()
    longer = train(tmp_path, *flags, "--max_steps=3", "--resume_from_checkpoint=true")
    (tmp_path / "metrics.json").write_bytes(early)
    finished = train(tmp_path, *flags, "--max_steps=3", "--resume_from_checkpoint=true")
    assert (finished["steps"], finished["eval_loss"]) == (3, longer["eval_loss"])


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
    pretrain.main(
        [*continued, f"--output_dir={tmp_path / 'b'}", *flags, f"--model_name_or_path={tmp_path / 'a'}"]
    )
    second = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("length", [["--max_steps=10"], ["--max_steps=-1", "--num_train_epochs=2"]])
def test_constant_then_linear_down_to_a_tenth(tmp_path, text_file, length):
    flags = [f"--train_files={text_file}", *length, "--learning_rate=0.5", "--optim=sgd", "--save_steps=1.0"]
    batch = 24 if length[0] == "--max_steps=-1" else 4
    steps = train(tmp_path, *flags, f"--per_device_train_batch_size={batch}", "--save_strategy=epoch")[
        "steps"
    ]
    _, rates = series(history(tmp_path, steps), "learning_rate")
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
    _, rates = series(history(tmp_path, 6), "learning_rate")
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75])


def test_a_warm_up_shortens_the_constant_part_then_the_decay(tmp_path, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=6", "--learning_rate=1", "--optim=sgd"]
    train(tmp_path, *flags, "--warmup_steps=4", "--decay_fraction=1.0")
    _, rates = series(history(tmp_path, 6), "learning_rate")
    assert rates[4:] == pytest.approx([1, 0.55])


# ---------------------------------------------------------------- options


def parsed(*flags):
    return parse(["--use_cpu=true", *flags], ARGUMENT_TYPES["pretrain"])


def test_the_command_line_overrides_the_yaml_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 3e-2\nmax_steps: 7\nstreaming: true\ndataset_name: a\nweight_decay: 0.5\n"
        "lr_scheduler_kwargs: {min_lr_ratio: 0.2}\nseed: null\noptim_args: momentum=0.9,beta2=0.8\n"
    )
    for flags in (["--config", str(path), "--max_steps", "9"], ["--max_steps", "9", "--config", str(path)]):
        _, data_args, args = parsed(*flags)
        assert (args.learning_rate, args.max_steps, args.weight_decay) == (0.03, 9, 0.5)
        assert args.lr_scheduler_kwargs == {"min_lr_ratio": 0.2}
        assert args.optim_args == "momentum=0.9,beta2=0.8"
        assert data_args.streaming is True
        assert args.max_grad_norm == 1.0
        assert args.seed == args.data_seed == 42


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 1.0),
        (["--optim=momo-muon", "--optim_args=step_size=momo"], 1.0),
        (["--optim=muon", "--optim_args=step_size=slope"], 1.0),
        (["--optim_args=step_size=rate"], 1e-2),
        (["--optim=muon"], 1e-2),
        (["--optim=adamw_torch"], 1e-2),
        (["--learning_rate=0.5"], 0.5),
    ],
)
def test_a_learning_rate_that_nobody_gives_is_1_where_it_only_bounds_the_steps(flags, rate):
    assert parsed(*flags)[2].learning_rate == rate
    _, digits_args = parse(["--use_cpu=true", *flags], ARGUMENT_TYPES["digits"])
    assert digits_args.learning_rate == rate


def test_lists_in_the_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train_files: [a.txt, b.txt]\noptim_target_modules: [c_attn, c_fc]\n")
    _, data_args, args = parsed("--config", str(path))
    assert data_args.train_files == ["a.txt", "b.txt"]
    assert args.optim_target_modules == ["c_attn", "c_fc"]
    assert parsed("--config", str(path), "--train_files", "c.txt")[1].train_files == ["c.txt"]


def test_the_example_of_the_default_run_is_the_default_run():
    written = parse(["--config", str(RECIPES / "configs" / "bible.yaml")], ARGUMENT_TYPES["pretrain"])
    for given, default in zip(written, parse([], ARGUMENT_TYPES["pretrain"]), strict=True):
        differing = {key for key, value in vars(given).items() if value != vars(default)[key]}
        assert differing <= {"global_batch_size", "lr_scheduler_kwargs", "distributed_state"}


def test_every_example_parses_for_the_devices_it_names():
    _, data_args, args = parsed(
        "--config", str(RECIPES / "configs" / "fineweb_124m.yaml"), "--gradient_accumulation_steps", "128"
    )
    assert args.sequences_per_step * data_args.block_size == 2**19
    assert args.bf16


def test_overrides_change_the_configuration(tmp_path, text_file):
    small = (
        "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1"
    )
    flags = [f"--train_files={text_file}", "--max_steps=1", "--model_type=llama"]
    train(tmp_path, *flags, f"--config_overrides={small},tie_word_embeddings=true")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == 300
    assert model.config.num_key_value_heads == 1
    assert model.config.tie_word_embeddings is True


# ---------------------------------------------------------------- bad input


def refused(tmp_path, capsys, *flags):
    """What a run that must not start says; it must leave no output folder."""
    folder = tmp_path / "refused"
    with pytest.raises(SystemExit) as caught:
        train(folder, *flags)
    assert caught.value.code == 2
    assert not folder.exists()
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    return captured.err


def written(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def help_of(capsys, recipe, flag):
    with pytest.raises(SystemExit) as end:
        parse([flag], ARGUMENT_TYPES[recipe])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", ARGUMENT_TYPES)
def test_help_shows_the_options_of_the_recipe_in_groups_and_those_of_the_trainer_on_demand(capsys, recipe):
    short, long = (help_of(capsys, recipe, flag) for flag in ("--help", "--help_all"))
    titles = re.findall(r"^(\w[\w ,]*):$", short, re.MULTILINE)
    assert titles == ["options", "model"] + ["data"] * (recipe != "digits") + ["training"]
    assert re.findall(r"^(\w[\w ,]*):$", long, re.MULTILINE) == [*titles, "all others, of the Trainer"]
    flags, all_flags = (re.findall(r"^  (--\w+)", text, re.MULTILINE) for text in (short, long))
    assert all_flags[: len(flags)] == flags
    own = {item.name for kind in ARGUMENT_TYPES[recipe] for item in fields(kind) if item.init}
    of_trainer = {item.name for item in fields(TrainingArguments) if item.init}
    named = {flag[2:] for flag in flags} - {"help_all", "config"}
    assert own - of_trainer <= named
    assert {"optim", "optim_args", "learning_rate", "max_steps"} <= named
    assert not {"seed", "bf16", "adafactor"} & named
    assert {flag[2:] for flag in all_flags} - {"help_all", "config"} == own | of_trainer
    assert "see --help_all" in short.splitlines()[-1]
    assert "--max-steps" not in long
    assert parse(["--max-steps=3"], ARGUMENT_TYPES[recipe])[-1].max_steps == 3


def test_files_with_columns_train_as_the_dataset_with_the_same_rows(tmp_path, dataset_folder):
    """Nothing of the JSON is learnt: the tokenizer, the blocks and the losses are those of the texts."""
    rows = f"{dataset_folder}/train.jsonl"
    flags = ["--max_steps=2", "--vocab_size=300"]
    files = train(tmp_path / "files", f"--train_files={rows}", f"--validation_files={rows}", *flags)
    splits = ["--train_split=train", "--validation_split=train"]
    dataset = train(tmp_path / "dataset", f"--dataset_name={dataset_folder}", *splits, *flags)
    assert files["eval_loss"] == dataset["eval_loss"]
    assert files["corpus"] == {**dataset["corpus"], "name": rows}
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "files").get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(tmp_path / "dataset").get_vocab()


def test_files_that_cannot_be_read(tmp_path, capsys, text_file):
    latin = written(tmp_path, "latin.txt", b"plain " * 3 + "für".encode("latin-1"))
    message = refused(tmp_path, capsys, f"--train_files={latin}")
    assert "latin.txt is not UTF-8" in message
    assert "at byte 19" in message
    assert "at byte 19" in refused(
        tmp_path, capsys, f"--train_files={text_file}", f"--validation_files={latin}"
    )
    assert "nowhere.txt: No such file" in refused(tmp_path, capsys, "--train_files=nowhere.txt")


def test_corpora_with_too_little_text(tmp_path, capsys):
    empty = written(tmp_path, "empty.txt", b"")
    assert "holds no text" in refused(tmp_path, capsys, f"--train_files={empty}")
    short = written(tmp_path, "short.txt", b"a few words\nand a few more")
    assert "do not fill one block of --block_size 32" in refused(tmp_path, capsys, f"--train_files={short}")
    message = refused(tmp_path, capsys, f"--dataset_name={Path(written(tmp_path, 'd/a.jsonl', b'')).parent}")
    assert "cannot load dataset" in message or "empty" in message


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_datasets_that_cannot_be_used(tmp_path, capsys, dataset_folder, streaming):
    flags = [f"--dataset_name={dataset_folder}", f"--streaming={streaming}"]
    message = refused(tmp_path, capsys, *flags, "--text_column=content")
    assert "no column 'content'" in message
    assert "text, id" in message
    assert "holds int64, not text" in refused(tmp_path, capsys, *flags, "--text_column=id")
    assert "split test" in refused(tmp_path, capsys, *flags, "--validation_split=test")
    message = refused(tmp_path, capsys, *flags, "--validation_documents=350")
    assert ("train part holds no text" if streaming == "true" else "350 leaves none to train on") in message
    missing = refused(tmp_path, capsys, "--dataset_name=nobody/nothing", f"--streaming={streaming}")
    assert "cannot load dataset nobody/nothing" in missing
    rows = b'{"text": ""}\n{"text": null}\n{"text": ""}\n'
    blank = Path(written(tmp_path, "blank/train.jsonl", rows)).parent
    assert "holds no text" in refused(
        tmp_path, capsys, f"--dataset_name={blank}", "--validation_documents=1", f"--streaming={streaming}"
    )


def test_an_empty_split(tmp_path, capsys, monkeypatch):
    none = datasets.Dataset.from_dict({"text": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: none)
    assert "is empty" in refused(tmp_path, capsys, "--dataset_name=some/thing")


def test_a_folder_that_holds_another_run(tmp_path, capsys, text_file):
    flags = [f"--train_files={text_file}", "--max_steps=1"]
    before = train(tmp_path, *flags)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, *flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert "--resume_from_checkpoint" in message
    assert "--overwrite_output_dir" in message
    assert json.loads((tmp_path / "metrics.json").read_text()) == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--optim=muonmaxx"], "muonmax_momo"),
        (["--optim_args=momentun=0.9"], "momentum"),
        (["--optim_args=momentum=1.5"], "momentum must be a number in [0, 1)"),
        (["--max_steps=0"], "--max_steps must be at least 1, or -1"),
        (["--max_steps=-5"], "--max_steps must be at least 1, or -1"),
        (["--optim=adamw_bnb_8bit"], "bitsandbytes"),
        (["--optim=galore_adamw", "--optim_target_modules=c_attn"], "galore_torch"),
        (["--report_to=scroll"], "scroll is not supported"),
        (["--learning_rates=3"], "unknown arguments: --learning_rates=3"),
        (["--learning_rate=fast"], "--learning_rate"),
        (["--global_batch_size=16"], "4 (per_device_train_batch_size) x 1 (gradient_accumulation_steps) x 1"),
        (["--decay_fraction=1.5"], "[0, 1]"),
        (["--resume_from_checkpoint=true"], "holds no checkpoint"),
        (["--resume_from_checkpoint=elsewhere"], "no trainer_state.json"),
        (["--resume_from_checkpoint=true", "--overwrite_output_dir"], "would delete"),
        (["--config_overrides=n_layers=3"], "has no n_layers"),
        (["--config_overrides=n_layer"], "key=value"),
        (["--config_overrides=vocab_size=100"], "300 tokens but the model's embedding only 100 rows"),
        (["--config_overrides=n_positions=16"], "longer than the model's 16 positions"),
        (["--model_type=gpt7"], "unknown --model_type 'gpt7'"),
        (["--model_type=gpt2", "--config_name=gpt2"], "each name a model"),
        (["--tokenizer_name=nobody/nothing"], "cannot load the tokenizer nobody/nothing"),
        (["--config_name=nobody/nothing"], "nobody/nothing"),
        (["--dataset_name=a"], "each name a corpus"),
        (["--vocab_size=100"], "at least 257"),
        (["--block_size=0"], "at least 1"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, capsys, text_file, without_packages, flags, expected):
    assert expected in refused(tmp_path, capsys, f"--train_files={text_file}", *flags)


@pytest.fixture
def without_packages(monkeypatch):
    """As where no optional package is installed."""
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: False)


def test_an_output_folder_under_a_file(tmp_path, capsys, text_file):
    (tmp_path / "file").touch()
    for folder in ("file", "file/sub", "file/sub/sub"):
        with pytest.raises(SystemExit) as caught:
            train(tmp_path / folder, f"--train_files={text_file}")
        assert caught.value.code == 2
        assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_broken_checkpoint(tmp_path, capsys, text_file):
    train(tmp_path / "base", f"--train_files={text_file}", "--max_steps=1")
    weights_file = tmp_path / "base" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-500])
    flags = [flag for flag in TINY if "overrides" not in flag]
    with pytest.raises(SystemExit) as caught:
        pretrain.main(
            [
                *flags,
                f"--train_files={text_file}",
                f"--model_name_or_path={tmp_path / 'base'}",
                f"--output_dir={tmp_path / 'out'}",
            ]
        )
    assert caught.value.code == 2
    assert "cannot build the model" in capsys.readouterr().err


def test_a_yaml_file_that_cannot_be_used(tmp_path, capsys):
    unknown = written(tmp_path, "a.yaml", b"learning_rate: 0.1\nlerning_rate: 0.1\nconfig: b.yaml\n")
    assert "unknown keys in the --config file: config, lerning_rate" in refused(
        tmp_path, capsys, f"--config={unknown}"
    )
    broken = written(tmp_path, "b.yaml", b"learning_rate: [0.1\n")
    assert "b.yaml" in refused(tmp_path, capsys, f"--config={broken}")
    wrong = written(tmp_path, "c.yaml", b"max_steps: many\n")
    assert "invalid int value: 'many'" in refused(tmp_path, capsys, f"--config={wrong}")


def test_a_stream_needs_a_number_of_steps(tmp_path, capsys, dataset_folder):
    flags = [f"--dataset_name={dataset_folder}", "--streaming", "--max_steps=-1"]
    assert "needs --max_steps" in refused(tmp_path, capsys, *flags)


# ---------------------------------------------------------------- two ranks


def launch(command, environment):
    """Run a launcher to its end; one that hangs is asked to end its workers, which outlive it when killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            out, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            process.terminate()
            pytest.fail(f"no end after 150 s:\n{process.communicate()[1]}", pytrace=False)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["files", "stream"])
def test_two_ranks(tmp_path, text_file, dataset_folder, source):
    flags = {
        "files": [f"--train_files={text_file}"],
        "stream": [f"--dataset_name={dataset_folder}", "--streaming", "--validation_documents=20"],
    }[source]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(RECIPES / "pretrain.py"), *TINY, *flags, "--max_steps=4", "--global_batch_size=8"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    out, err = launch([*command, f"--output_dir={tmp_path / 'two'}", "--sample_tokens=3"], environment)
    assert out.count("Validation loss") == out.count("Sample, from") == 1, err
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["tokens"] == 4 * 8 * 32

    one = train(tmp_path / "one", *flags, "--max_steps=4", "--per_device_train_batch_size=8")
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)


TAKE = """
import sys
import torch
import hf_noneuclid
from hf_noneuclid.experiments.training import checkpoints
from hf_noneuclid.experiments.training.masked import MaskingCollator
from hf_noneuclid.experiments.training.model import train_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, parse
from hf_noneuclid.experiments.training.packing import IGNORED
argv = ["--use_cpu=true", f"--output_dir={sys.argv[1]}", "--resume_from_checkpoint=true"]
_, _, args = parse(argv, ARGUMENT_TYPES["pretrain"])
if args.process_index == 1:  # a file system that shows this process less than the first
    checkpoints._last_whole = lambda folder: folder / "checkpoint-2"
print("taken:", checkpoints.find_checkpoint(args))
torch.distributed.destroy_process_group()  # a process that ends with its threads may abort
"""


@pytest.mark.distributed
def test_all_ranks_take_the_same_checkpoint(tmp_path):
    (tmp_path / "take.py").write_text(TAKE)
    for step in (2, 10):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 200}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{RECIPES}:{RECIPES.parent}"}
    out, _ = launch([*command, str(tmp_path / "take.py"), str(tmp_path / "out")], environment)
    assert out.count(f"taken: {tmp_path / 'out' / 'checkpoint-10'}") == 2
