"""Prefill in chunks and greedy decoding, one visible step at a time, with any transformers model and cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What greedy decoding did: the most probable token of each step, its logits, and the time each step took."""

    tokens: list[int]
    logits: Tensor  # float32 [num_steps, vocab], on the CPU
    step_ms: list[float]


def prefill(model: Any, cache: Any, ids: Tensor, on_progress: Callable[[int], None] = lambda num_tokens: None) -> None:
    """Run ids [batch, num_tokens] through the model into the cache, chunk by chunk. Attention is dense here."""
    with torch.no_grad():
        for chunk in ids.to(model.device).split(PREFILL_CHUNK_TOKENS, dim=1):
            model(input_ids=chunk, **cache.kwargs(), use_cache=True, logits_to_keep=1)
            on_progress(chunk.shape[1])


def decode(
    model: Any,
    cache: Any,
    first: int,
    num_tokens: int,
    *,
    forced: list[int] | None = None,
    stop: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] = lambda token: None,
    watched_ms: Callable[[], float] = lambda: 0.0,
) -> Decoded:
    """Decode greedily after a prefill, feeding ``first`` (the prompt's last token) as the first step.

    Args:
        forced: feed these tokens instead of the model's own choices, to compare two models along one path.
        stop: end after any of these tokens.
        on_token: called with each step's most probable token.
        watched_ms: the time an observer has taken so far, which is not the decoder's.
    """
    tokens, logits, step_ms = [], [], []
    feed = first
    with torch.no_grad():
        for step in range(num_tokens):
            ids = torch.tensor([[feed]], device=model.device)
            started, watched = time.perf_counter(), watched_ms()
            row = model(input_ids=ids, **cache.kwargs(), use_cache=True).logits[0, -1].float().cpu()
            step_ms.append(1e3 * (time.perf_counter() - started) - (watched_ms() - watched))
            tokens.append(int(row.argmax()))
            logits.append(row)
            on_token(tokens[-1])
            if tokens[-1] in stop:
                break
            feed = tokens[-1] if forced is None else forced[step]
    return Decoded(tokens=tokens, logits=torch.stack(logits), step_ms=step_ms)


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config and its tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)


def kl_nats(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) per row of logits [num_steps, vocab], in nats, computed in float64."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)
