"""A tokenizer and a model small enough for tests of experiments on whole models."""

import re

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 512


class ToyTokenizer:
    """Every word, number or sign is a token, with the blank before it; rare ones share a token."""

    is_fast = False
    chat_template = None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True, **_) -> dict[str, list[int]]:
        pieces = re.findall(r" ?\w+|\s|[^\w\s]", text)
        return {"input_ids": [self._ids.setdefault(piece, len(self._ids) % VOCAB) for piece in pieces]}

    def decode(self, ids: list[int]) -> str:
        pieces = list(self._ids)
        return "".join(pieces[i] for i in ids)


def toy_model(**changes) -> LlamaForCausalLM:
    """A random Llama, peaky enough that wrong attention changes its tokens."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.15,
        "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
