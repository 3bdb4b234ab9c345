"""TRL's trainers, used as its scripts do."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from common import WORDS, Record, arguments, build, counting, every_method, every_method_and_rate, tokenizer
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_noneuclid

pytestmark = pytest.mark.clients


def prompt(i):
    return {"prompt": counting(i, 6) + " "}


def pair(i):
    """Counting on is right, counting back is wrong."""
    return {**prompt(i), "chosen": counting(i + 6, 6), "rejected": counting(i + 5, 6, by=-1)}


def judged(i):
    both = pair(i)
    return {**prompt(i), "completion": both["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}


def reward_words(completions, **kwargs):
    """The share of words from the first half of the list."""
    wanted = set(WORDS[:20])
    return [sum(word in wanted for word in text.split()) / max(1, len(text.split())) for text in completions]


def train(trainer, args, example, tmp_path, head=LlamaForCausalLM, **more):
    # Some trainers load the model a second time, as a reference.
    changes = {"num_labels": 1} if head is LlamaForSequenceClassification else {}
    build(head, "llama", **changes).save_pretrained(tmp_path / "model")
    record = Record()
    trainer(
        model=head.from_pretrained(tmp_path / "model"),
        args=args,
        train_dataset=Dataset.from_list([example(i) for i in range(500)]),
        processing_class=tokenizer(),
        callbacks=[record],
        **more,
    ).train()
    return record


@every_method_and_rate
def test_sft(tmp_path, method, rate):
    args = SFTConfig(**arguments(tmp_path, method, rate), max_length=32)
    record = train(SFTTrainer, args, lambda i: {"text": counting(i, 16)}, tmp_path)
    record.check(rate, fell_to=0.4)


@every_method
def test_sft_with_the_mixin(tmp_path, method):
    class MuonTrainer(hf_noneuclid.NonEuclidTrainerMixin, SFTTrainer):
        pass

    MuonTrainer.method = method
    options = arguments(tmp_path, method, 1.0, max_length=32)
    del options["optim"]
    record = train(MuonTrainer, SFTConfig(**options), lambda i: {"text": counting(i, 16)}, tmp_path)
    record.check(1.0, fell_to=0.4)


@every_method_and_rate
def test_dpo(tmp_path, method, rate):
    args = DPOConfig(**arguments(tmp_path, method, rate, per_device_train_batch_size=8))
    train(DPOTrainer, args, pair, tmp_path).check(rate, fell_to=0.5)


@every_method_and_rate
def test_kto(tmp_path, method, rate):
    args = KTOConfig(**arguments(tmp_path, method, rate, per_device_train_batch_size=8))
    train(KTOTrainer, args, judged, tmp_path).check(rate, fell_to=0.5)


@every_method_and_rate
def test_reward(tmp_path, method, rate):
    args = RewardConfig(**arguments(tmp_path, method, rate))
    train(RewardTrainer, args, pair, tmp_path, LlamaForSequenceClassification).check(rate, fell_to=0.5)


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@every_method
def test_a_policy_is_trained(tmp_path, method, trainer, config):
    """Its loss says nothing: it is a number around 0, above or below. The reward must rise."""
    short = {"num_generations": 8, "max_completion_length": 8, "per_device_train_batch_size": 32}
    args = config(**arguments(tmp_path, method, 1.0, max_steps=50, **short))
    record = train(trainer, args, prompt, tmp_path, reward_funcs=reward_words)
    record.check_seen()
    rewards = [logs["reward"] for logs in record.logs]
    assert sum(rewards[:5]) / 5 < 0.6
    assert sum(rewards[-5:]) / 5 > 0.8
    assert record.last["limited_steps"] == 0
