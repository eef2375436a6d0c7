"""Tiny random models: small enough for a test, peaky enough that wrong attention changes the tokens."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 128
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # the default makes attention almost uniform, and everything agrees
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def llama(**changes) -> PreTrainedModel:
    """Grouped-query attention, nothing else."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**SHAPE | {"num_hidden_layers": 2} | changes))


def qwen3(**changes) -> PreTrainedModel:
    """Normalised queries and keys."""
    return _seeded(Qwen3ForCausalLM, Qwen3Config(**SHAPE | {"num_hidden_layers": 2} | changes))


def gemma3(**changes) -> PreTrainedModel:
    """Layers with a sliding window of 8 tokens between layers with full attention."""
    return _seeded(Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 4} | SLIDING | changes))


FAMILIES = {"llama": llama, "qwen3": qwen3, "gemma3": gemma3}


def _seeded(model_class: type, config) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)
        return model_class(config).eval()
