"""A small model with everything that is hard to shard, its data, and one process that trains it alone."""

import math
from typing import ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import hf_noneuclid

RANKS, BATCH, ACCUMULATION, STEPS = 2, 4, 2, 20
WIDTH, VOCABULARY, LENGTH, EXPERTS = 16, 37, 6, 3
CLIP, LOWER_BOUND = 0.5, 1.8
METHODS = tuple(hf_noneuclid.METHODS)


def learning_rate(method):
    """High enough that Momo truncates some of the steps."""
    return 0.05 if method.startswith("polargrad") else 0.01


def options_of(method):
    """A lower bound close to the loss, so that Momo truncates some of the steps.

    Newton-Schulz: Polar Express lifts singular values of 1e-3 to 1, and their rounding errors with them, so
    that 20 steps of this tiny model on the same batches in another order end 1e-4 apart.
    """
    bound = {"step_size": "momo", "loss_lower_bound": LOWER_BOUND} if method.endswith("momo") else {}
    return {"polar_method": "newton_schulz", **bound}


SLOPE = {"step_size": "momo+slope", "loss_lower_bound": 0.0, "first_step": 1e-3}


class Experts(nn.Module):
    """A stack of expert matrices. Every token goes to all of them."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        return torch.einsum("bti,eio->bto", x, self.down_proj) / EXPERTS


class Block(nn.Module):
    """Matrices of uneven rows (33 and 7), a frozen one, one of a single row, and experts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 33)
        self.narrow = nn.Linear(33, 7, bias=False)
        self.down = nn.Linear(7, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        self.experts = Experts()

    def forward(self, x):
        y = self.norm(x)
        y = y + self.down(self.narrow(torch.tanh(self.up(y))))
        y = self.frozen(y) * torch.sigmoid(self.gate(y))
        return x + self.experts(torch.tanh(y))


class Model(PreTrainedModel):
    """A language model with tied embeddings."""

    config_class = PretrainedConfig
    _tied_weights_keys: ClassVar = {"head.weight": "embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        """The modules have done it."""

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def make_model():
    torch.manual_seed(0)
    return Model(PretrainedConfig(tie_word_embeddings=True))


def rows():
    """The rows of all steps, in order."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        VOCABULARY, (STEPS * ACCUMULATION * RANKS * BATCH, LENGTH + 1), generator=generator
    )
    tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn
    return [{"tokens": row[:-1], "labels": row[1:]} for row in tokens]


def flat(state):
    """Name to tensor, with names as the bare model has them."""
    return {name.removeprefix("module."): x.detach().float().cpu().clone() for name, x in state}


def train_alone(method, steps=STEPS, **options):
    """The same global batches in one process: parameters at the end, and τ of every step."""
    model, data, taken = make_model(), rows(), []
    options = {**options_of(method), **options}
    optimizer = hf_noneuclid.create_optimizer(model, method, lr=learning_rate(method), **options)
    size = ACCUMULATION * RANKS * BATCH
    for step in range(steps):
        batch = data[step * size : (step + 1) * size]
        loss = model(*(torch.stack([row[key] for row in batch]) for key in ("tokens", "labels")))["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.observe_clipping(min(1.0, CLIP / (norm.item() + 1e-6)))
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        taken.append(optimizer.diagnostics()["step_size"])
    return {"parameters": flat(model.named_parameters()), "step_sizes": taken}


def distance(ours, theirs):
    """The largest relative difference of any parameter."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - x).norm() / x.norm()).item() for name, x in theirs.items())


def relative(ours, theirs):
    """The largest relative difference of any number."""
    return max(abs(x - y) / abs(y) if y else math.inf for x, y in zip(ours, theirs, strict=True))
