"""Checks of what a model sees: no later token, and no example packed with its own.

They run the model as it was loaded, without gradients. All processes must call them.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, pairwise

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_noneuclid.experiments.common import require
from hf_noneuclid.experiments.training.data import Corpus

SHORT = 16  # tokens of an example that is compared


def check_causality(model: PreTrainedModel) -> None:
    """Raises InputError if a change of the last token changes the logits before it, as in an encoder."""
    ids = list(range(min(SHORT, model.config.get_text_config().vocab_size)))
    with _evaluating(model):
        before, after = (_logits(model, [tokens])[:-1] for tokens in (ids, [*ids[:-1], ids[0]]))
    require(
        not _differ(before, after),
        f"{type(model).__name__} sees the tokens that it should predict: it is an encoder, which can be a "
        f"classifier (recipes/classify.py) but not a causal language model",
    )


def check_isolation(model: PreTrainedModel, data: Corpus) -> None:
    """Raises InputError if two packed examples do not give the same logits as each of them alone.

    That a model takes ``position_ids`` does not say that it isolates by them: OPT's only shift its positions.
    """
    for row in chain(data.train.dataset, data.validation.dataset):
        if "position_ids" not in row:
            return
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        if len(starts) > 1 and max(row["labels"][starts[1] :]) >= 0:  # otherwise the second is filling
            break
    else:
        return
    examples = [row["input_ids"][i:j][:SHORT] for i, j in pairwise([*starts, len(row["input_ids"])])][:2]
    with _evaluating(model):
        packed = _logits(model, examples)
        alone = torch.cat([_logits(model, [ids]) for ids in examples])
    require(
        not _differ(packed, alone),
        f"{type(model).__name__} does not isolate examples by their position_ids: a packed one sees those "
        f"before it in its sequence; give --packing false",
    )


def _differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Rounding is relative and adds up over the layers; what a token sees of others is far above it.
    rounding = max(1e-4, 4 * torch.finfo(found.dtype).eps)
    return bool(torch.dist(found, expected) > rounding * torch.linalg.vector_norm(expected))


def _logits(model: PreTrainedModel, examples: list[list[int]]) -> torch.Tensor:
    """The logits of every token, of shape (tokens, vocabulary), as the Trainer would ask for them."""
    columns = {
        "input_ids": [token for ids in examples for token in ids],
        "position_ids": [position for ids in examples for position in range(len(ids))],
    }
    accepted = inspect.signature(model.forward).parameters  # the Trainer drops other columns
    device = model.get_input_embeddings().weight.device
    # Two equal sequences: some kernels isolate packed examples only when there is a single sequence.
    inputs = {
        name: torch.tensor([ids] * 2, device=device) for name, ids in columns.items() if name in accepted
    }
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[1]
    return logits


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; gathers what ZeRO-3 has spread, one layer of the stack at a time."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), ExitStack() as stack:
        if is_deepspeed_zero3_enabled():
            from deepspeed import zero  # an attribute of the package, not a module

            layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), ())
            inside = {weight for layer in layers for weight in layer.parameters()}
            outside = [weight for weight in model.parameters() if weight not in inside]
            stack.enter_context(zero.GatheredParameters(outside))
            for layer in layers:
                held = zero.GatheredParameters(list(layer.parameters()))
                enter = layer.register_forward_pre_hook(lambda *_, held=held: held.__enter__())
                leave = layer.register_forward_hook(lambda *_, held=held: held.__exit__(None, None, None))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield
    model.train(was_training)
