"""What the tests of clients share: tiny models, texts of a few words, and what every training must show."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from hf_noneuclid import NonEuclideanDescent

METHODS = ("muonmax_momo", "muon_momo")
every_method = pytest.mark.parametrize("method", METHODS)
every_method_and_rate = pytest.mark.parametrize(
    ("method", "rate"), [(method, rate) for rate in (1.0, 1e-3) for method in METHODS]
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]
WORDS = [f"w{i}" for i in range(41)]
VOCABULARY = len(SPECIAL) + len(WORDS)

GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 5,
    "eos_token_id": 6, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 5,
    "eos_token_id": 6, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CONFIGS = {"gpt2": (GPT2Config, GPT2), "llama": (LlamaConfig, LLAMA), "bert": (BertConfig, BERT)}


def build(head, architecture, **changes):
    """A tiny model with the same random weights in every test."""
    config, values = CONFIGS[architecture]
    torch.manual_seed(0)
    return head(config(**{**values, **changes}))


def tokenizer():
    """Splits at spaces and knows ``WORDS``."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", bos_token="<s>", eos_token="</s>", model_max_length=64,
    )  # fmt: skip


def counting(start, length, by=1):
    """A text of words in a fixed order, which a tiny model soon learns."""
    return " ".join(WORDS[(start + by * i) % len(WORDS)] for i in range(length))


def arguments(path, method, rate, **more):
    """Options for the arguments of a Trainer: a short run on the CPU that logs every step."""
    return {
        "output_dir": str(path), "optim": method, "learning_rate": rate, "max_steps": 60, "logging_steps": 1,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, **more,
    }  # fmt: skip


@dataclass
class Record(TrainerCallback):
    """What a client logs at every step, beside what the optimizer knows."""

    losses: list = field(default_factory=list)
    known: list = field(default_factory=list)
    logs: list = field(default_factory=list)
    last: dict = field(default_factory=dict)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)
            self.note(logs["loss"], optimizer)

    def note(self, loss, optimizer):
        """Notes a step, with the loss that the client tells; no step may be longer than the learning rate."""
        while not isinstance(optimizer, NonEuclideanDescent):
            optimizer = optimizer.optimizer
        self.last = optimizer.diagnostics()
        self.losses.append(float(loss))
        self.known.append(self.last["loss"])
        is_regularized = optimizer.param_groups[0]["descent"] == "regularized"
        unit = self.last["dual_norm"] if is_regularized else 1.0
        assert max(self.last["step_size"], self.last["vector_step_size"]) * unit <= 1.0001 * self.last["lr"]

    def check_seen(self):
        """Asserts that Momo has seen every loss as the client tells it."""
        assert all(map(math.isfinite, self.losses)), self.losses
        assert self.known == pytest.approx(self.losses, rel=1e-3, abs=1e-5)
        assert (self.last["steps"], self.last["bad_steps"]) == (len(self.losses), 0)

    def mean_of_last(self):
        return sum(self.losses[-5:]) / 5

    def check(self, rate, fell_to, slowly_to=0.99):
        """Asserts that every loss was seen, and that training went as it must.

        Args:
            rate: The learning rate. 1 may bound no step, and 0.001 bounds most.
            fell_to: The part of the first loss below which the mean of the last five is, at a rate of 1.
            slowly_to: The same at a rate of 0.001.
        """
        self.check_seen()
        part = fell_to if rate == 1 else slowly_to
        assert self.mean_of_last() < part * self.losses[0], self.losses
        assert (self.last["limited_steps"] == 0) is (rate == 1), self.last["limited_steps"]
