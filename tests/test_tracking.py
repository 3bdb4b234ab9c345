"""What trackio, TensorBoard and wandb show of a run: all that its log says, with no flag but their names."""

import json
import sqlite3

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hf_noneuclid  # noqa: F401  (enters the methods into the Trainer's registry)

VOCABULARY, LENGTH = 32, 8
KEYS = (
    "learning_rate",
    "step_size",
    "truncation_rate",
    "dual_norm",
    "loss_lower_bound",
    "nuclear_norm_max",
    "nuclear_norm_median",
    "nuclear_norm_min",
)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains for six steps that a tracker is told of; returns each of the three logs by its step."""

    def run(tracker):
        torch.manual_seed(0)
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": LENGTH, "vocab_size": VOCABULARY}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (24, LENGTH))]
        args = TrainingArguments(
            str(tmp_path / "run"),
            optim="muonmax_momo",
            learning_rate=1e-2,
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=2,
            save_strategy="no",
            report_to=tracker,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
        return {entry["step"]: {key: entry[key] for key in KEYS} for entry in history}

    # Nothing is to leave this machine.
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        monkeypatch.delenv(name, raising=False)
    local = {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "events"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
    }
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    return run


def test_tensorboard_shows_what_the_log_says(train, tmp_path):
    logs = train("tensorboard")
    assert list(logs) == [2, 4, 6]
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for key in KEYS:
        shown = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert shown == pytest.approx({step: log[key] for step, log in logs.items()}, rel=1e-6), key


def test_trackio_shows_what_the_log_says(train, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    logs = train("trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    database = sqlite3.connect(file)
    rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY rowid")]
    database.close()
    shown = {row["train/global_step"]: row for row in rows if "train/step_size" in row}
    assert {step: {key: row[f"train/{key}"] for key in KEYS} for step, row in shown.items()} == logs


def test_wandb_shows_what_the_last_log_says(train):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    logs = train("wandb")
    shown = dict(wandb.run.summary)
    wandb.finish()
    assert {key: shown[f"train/{key}"] for key in KEYS} == logs[6]
