"""The attention function named "louver": asks the layer that marked the keys and values, or does what transformers' SDPA does.

Served: one new token per row on a LouverLayer, with no mask or a left-padding mask, and up to 16 new tokens with a causal one,
as assisted decoding verifies them. Everything else (prefill, another cache, an unusual mask) is dense attention by
transformers' own SDPA function on the same tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from louver.integrations.transformers.layer import LouverLayer, layer_of
from louver.integrations.transformers.support import check_call, check_no_training

NAME = "louver"
MOST_TOKENS = 16  # new tokens per row that count as decoding; more are a prompt, or a part of one


def register() -> None:
    """Make the name known to transformers. Without a mask function of that name, padding would be ignored silently."""
    AttentionInterface.register(NAME, louver_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.compiler.disable  # a compiled model breaks its graph here; tracing an index would take minutes and gain nothing
def louver_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [batch, num_q_heads, q_len, head_dim]; returns [batch, q_len, num_q_heads, head_dim].

    Raises:
        UnsupportedModelError: the model asks for more than plain softmax attention.
    """
    check_call(module, kwargs)
    layer = layer_of(key)
    if layer is not None and layer_of(value) is layer:  # a model may attend other values than its cache holds
        check_no_training(key, dropout)
        out = _ask(layer, query, attention_mask, query.shape[-1] ** -0.5 if scaling is None else float(scaling))
        if out is not None:
            return out, None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out, None


def _ask(layer: LouverLayer, query: Tensor, mask: Tensor | None, softmax_scale: float) -> Tensor | None:
    """The layer's output [batch, q_len, num_q_heads, head_dim] for a decode step, None where attention is to be dense."""
    layer.answered()
    padding = layer.shared.read_padding(mask)
    is_decode = query.shape[2] == 1
    if padding is None or not layer.accepts(padding, query.shape[2]):
        if is_decode:
            layer.shared.stats.num_dense_calls += 1
            layer.shared.warn_once(
                "mask",
                "a decode step came with a mask that is not the left padding of the prompt, so it is attended densely",
            )
        return None
    if is_decode:
        return layer.attend(query.select(2, 0), padding, softmax_scale).unsqueeze(1)  # indexing takes twice as long
    if layer.get_seq_length() > query.shape[2] <= MOST_TOKENS and layer.shared.read_padding.is_causal(mask):
        out = layer.attend_many(query, padding, softmax_scale)
        if out is not None:
            return out
    layer.observe(query, padding, softmax_scale)
    return None
