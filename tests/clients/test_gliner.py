"""GLiNER: its losses are sums, whose gradients are clipped a thousandfold, and its Trainer makes groups."""

import random

import pytest

pytest.importorskip("gliner", reason="GLiNER is not installed")

import torch
from common import BERT, WORDS, Record, arguments, every_method, every_method_and_rate, tokenizer
from gliner import GLiNERConfig
from gliner.model import UniEncoderSpanGLiNER
from gliner.training import Trainer, TrainingArguments

import hf_noneuclid

pytestmark = pytest.mark.clients


def build_gliner():
    words = tokenizer()
    words.add_tokens(["[FLERT]", "<<ENT>>", "<<SEP>>"])
    config = GLiNERConfig(
        model_name="tiny", hidden_size=32, max_width=4, dropout=0.0, max_types=4, max_len=32,
        class_token_index=len(words) - 2, vocab_size=len(words),
        encoder_config={**BERT, "vocab_size": len(words), "model_type": "bert"},
    )  # fmt: skip
    torch.manual_seed(0)
    return UniEncoderSpanGLiNER(config, tokenizer=words)


def named(i):
    """Words from the first two quarters of the list are entities of two kinds."""
    numbers = [random.Random(i).randrange(20), *random.Random(-i).choices(range(41), k=9)]
    kinds = {0: "w40", 1: "w39"}
    ner = [[j, j, kinds[number // 10]] for j, number in enumerate(numbers) if number < 20]
    return {"tokenized_text": [WORDS[number] for number in numbers], "ner": ner}


def train(tmp_path, method, rate, trainer=Trainer, optimizer=None, **more):
    model, record = build_gliner(), Record()
    trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, method, rate, per_device_train_batch_size=8, **more)),
        train_dataset=[named(i) for i in range(1000)],
        data_collator=model._create_data_collator(),
        processing_class=model.data_processor.transformer_tokenizer,
        optimizers=(optimizer(model) if optimizer else None, None),
        callbacks=[record],
    ).train()
    return record


@every_method_and_rate
def test_gliner_by_name(tmp_path, method, rate):
    record = train(tmp_path, method, rate)
    assert record.logs[0]["grad_norm"] > 500
    record.check(rate, fell_to=0.4)


@every_method
def test_gliner_with_an_optimizer(tmp_path, method):
    record = train(
        tmp_path, method, 1.0, optimizer=lambda model: hf_noneuclid.create_optimizer(model, method, lr=1.0)
    )
    record.check(1.0, fell_to=0.4)


def test_gliner_trains_by_its_own_method(tmp_path):
    """``train_model`` makes the Trainer, which makes four groups, each with the learning rate."""
    model = build_gliner()
    trainer = model.train_model(
        [named(i) for i in range(1000)],
        None,
        output_dir=str(tmp_path),
        optim="muonmax_momo",
        learning_rate=1.0,
        max_steps=60,
        logging_steps=1,
        dataloader_num_workers=0,
        use_cpu=True,
    )
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
