"""The models that are planned and benchmarked."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig
from transformers import PretrainedConfig as Config

MODELS: dict[str, Config] = {
    "gpt2": GPT2Config(),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "llama-7b": LlamaConfig(),
    "llama-7b-layers": LlamaConfig(num_hidden_layers=4),
    "moe": MixtralConfig(hidden_size=1024, intermediate_size=3584, num_hidden_layers=4),
    # No number of ranks divides its rows and its vocabulary.
    "tiny": GPT2Config(
        **{"vocab_size": 97, "n_positions": 16, "n_embd": 26, "n_inner": 51, "n_layer": 3, "n_head": 2},
        **{"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"},
    ),
    "tiny-moe": MixtralConfig(
        **{"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3},
    ),
}
"""Configurations by name. None of them needs a network."""


def load_config(name: str) -> Config:
    """Reads a configuration: a key of ``MODELS``, a folder, a ``config.json``, or an id of the Hub.

    Raises:
        ValueError: There is no such configuration.
    """
    if name in MODELS:
        return MODELS[name]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {name} is not one of {', '.join(MODELS)}, and no folder, config.json or Hub id has "
            f"this name: {str(error).splitlines()[0]}"
        ) from error


def build(config: Config, device: torch.device) -> nn.Module:
    """Builds a causal language model with random float32 weights; on the device ``meta`` with none."""
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
