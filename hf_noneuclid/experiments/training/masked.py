"""Masked language models: which tokens are hidden, and the loss over them."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_noneuclid.experiments.common import require
from hf_noneuclid.experiments.training import causal
from hf_noneuclid.experiments.training.packing import IGNORED, collate

summed_losses = partial(causal.summed_losses, ahead=0)
"""The sum of the losses and the number of hidden tokens of each block, of shape (batch, 2)."""

CHOSEN = 0.15  # of the tokens are to be learnt, as in BERT
MASKED, REPLACED = 0.8, 0.1  # of those are hidden, or replaced by a random token; the others stay


@dataclass(frozen=True)
class MaskingCollator:
    """Makes a batch of blocks in which some tokens are hidden; these are the labels.

    What is hidden depends on the tokens of the block alone: it is the same in every epoch and every run.
    """

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        has_mask = self.tokenizer.mask_token_id is not None
        require(has_mask, "--task masked_lm: the tokenizer has no mask_token; give another --tokenizer_name")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = collate(rows)["input_ids"]
        draws, others = map(torch.stack, zip(*map(self._draw, tokens), strict=True))
        draws = draws.argsort(dim=1).argsort(dim=1) / tokens.shape[1]  # ranks: every block has its share
        inputs = tokens.where(draws >= CHOSEN * (MASKED + REPLACED), others)
        inputs = inputs.where(draws >= CHOSEN * MASKED, self.tokenizer.mask_token_id)
        return {"input_ids": inputs, "labels": tokens.where(draws < CHOSEN, IGNORED)}

    def _draw(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes()))
        others = torch.randint(len(self.tokenizer), tokens.shape, generator=generator)
        return torch.rand(tokens.shape, generator=generator), others
