"""The heads of transformers' example scripts, trained as these scripts do."""

import pytest
import torch
from common import Record, arguments, build, every_method_and_rate
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_noneuclid  # noqa: F401  (its methods by name)

pytestmark = pytest.mark.clients


def random_words(i):
    return torch.randint(7, 48, (16,), generator=torch.Generator().manual_seed(i))


def counted(i):
    """run_clm.py: every word is the one after the word before."""
    words = torch.arange(i, i + 16) % 41 + 7
    return {"input_ids": words, "labels": words}


def classified(i):
    """run_glue.py: the first word decides."""
    words = random_words(i)
    return {"input_ids": words, "labels": int(words[0] > 27)}


def answered(i):
    """run_qa.py: the answer lies between two marks."""
    words, start = random_words(i), i % 10
    words[start], words[start + 4] = 2, 3
    return {"input_ids": words, "start_positions": start, "end_positions": start + 4}


def named(i):
    """run_ner.py: two kinds of words."""
    words = random_words(i)
    return {"input_ids": words, "labels": words % 2}


def drawn(i):
    """run_image_classification.py: bright above, or bright below."""
    image = 0.1 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i))
    image[:, 4 * (i % 2) : 4 * (i % 2) + 4] += 3
    return {"pixel_values": image, "labels": i % 2}


def build_vit():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "architecture", "example", "fell_to"),
    [
        pytest.param(GPT2LMHeadModel, "gpt2", counted, 0.4, id="causal_lm-gpt2"),
        pytest.param(LlamaForCausalLM, "llama", counted, 0.4, id="causal_lm-llama"),
        pytest.param(BertForSequenceClassification, "bert", classified, 0.4, id="sequence_classification"),
        pytest.param(BertForQuestionAnswering, "bert", answered, 0.4, id="question_answering"),
        pytest.param(BertForTokenClassification, "bert", named, 0.4, id="token_classification"),
    ],
)
@every_method_and_rate
def test_a_head_is_trained(tmp_path, head, architecture, example, fell_to, method, rate):
    args, record = TrainingArguments(**arguments(tmp_path, method, rate)), Record()
    data = [example(i) for i in range(2000)]
    Trainer(build(head, architecture), args, train_dataset=data, callbacks=[record]).train()
    record.check(rate, fell_to)


@every_method_and_rate
def test_images_are_classified(tmp_path, method, rate):
    args = TrainingArguments(**arguments(tmp_path, method, rate, remove_unused_columns=False))
    record, data = Record(), [drawn(i) for i in range(2000)]
    Trainer(build_vit(), args, train_dataset=data, callbacks=[record]).train()
    record.check(rate, fell_to=0.6)
