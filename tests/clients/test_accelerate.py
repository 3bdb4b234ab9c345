"""accelerate's own loop, without a Trainer: its example, with another optimizer."""

import math

import pytest
import torch
from accelerate import Accelerator
from common import Record, build, every_method, every_method_and_rate
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, get_linear_schedule_with_warmup

import hf_noneuclid

pytestmark = pytest.mark.clients

STEPS = 60


def classified(i):
    """The first word decides."""
    words = torch.randint(7, 48, (16,), generator=torch.Generator().manual_seed(i))
    return {"input_ids": words, "labels": int(words[0] > 27)}


def train(method, rate, accumulation=1, clip_to=math.inf, steps=STEPS):
    """The loop of nlp_example.py, and with accumulation that of by_feature/gradient_accumulation.py."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(0)
    data = DataLoader([classified(i) for i in range(32 * steps)], batch_size=32 // accumulation, shuffle=True)
    model = build(BertForSequenceClassification, "bert")
    optimizer = hf_noneuclid.create_optimizer(model, method, lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, STEPS)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    hf_noneuclid.observe(accelerator)
    record, losses = Record(), []
    model.train()
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), clip_to)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            record.note(sum(losses) / len(losses), optimizer)
            losses.clear()
    return record, norm.item()


@pytest.mark.parametrize("accumulation", [1, 2])
@every_method_and_rate
def test_a_loop_is_observed(method, rate, accumulation):
    record, _ = train(method, rate, accumulation)
    record.check(rate, fell_to=0.3)


@every_method
def test_clipping_is_observed(method):
    """The gradients of the first step were multiplied by a factor, and so is their model of the loss."""
    plain, norm = train(method, 1.0, accumulation=2, steps=1)
    clipped, _ = train(method, 1.0, accumulation=2, steps=1, clip_to=norm / 10)
    assert clipped.last["running_loss"] == pytest.approx(plain.last["running_loss"] / 10, rel=1e-4)
