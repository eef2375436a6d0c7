"""Tokens per second of a model whose decode step is one CUDA graph, and how far its logits are from those of the model's own loop."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from louver.integrations.transformers import CapturedDecoding
from louver.kernels.ops import TierOutput
from louver.protocols import COUNTS


def in_graph(model: Any, arguments: dict[str, Any], cache: Any, kv_len: int, new_tokens: int) -> dict:
    """Milliseconds per token of replays (median of three runs), and how far their logits are from those of the model's own loop."""
    first = torch.ones(1, dtype=torch.long, device=model.device)
    if isinstance(cache, StaticCache):
        decode = captured_static(model, arguments, first, kv_len)
        times = [elapsed(lambda: decode(new_tokens // 2), model.device.type) for _ in range(3)]
        return {"token_ms": statistics.median(times) / (new_tokens // 2), "num_equal_tokens": None}
    tokens, want = usual_steps(model, arguments, first, new_tokens)
    cache.crop(kv_len - cache.get_seq_length())
    decoding = CapturedDecoding(model, cache)
    got = torch.cat([decoding(token).clone() for token in tokens[:-1]])
    times = [elapsed(lambda: decoding.generate(first, new_tokens), model.device.type) for _ in range(3)]
    return {
        "token_ms": statistics.median(times) / new_tokens,
        **agreement(got.float(), want.float()),
        "num_tokens": new_tokens,
        "scanned_fraction": scanned(decoding.evidence),
    }


@torch.no_grad()
def usual_steps(model: Any, arguments: dict[str, Any], token: Tensor, new_tokens: int) -> tuple[list[Tensor], Tensor]:
    """What the model's own loop chooses after token, token included, and its logits [new_tokens, vocabulary]."""
    tokens, logits = [token], []
    for _ in range(new_tokens):
        logits.append(model(tokens[-1][:, None], **arguments).logits[:, -1].clone())
        tokens.append(logits[-1].argmax(-1))
    return tokens, torch.cat(logits)


def agreement(got: Tensor, want: Tensor) -> dict:
    """Of logits over the same tokens: equal choices, the largest difference, and the largest lead a choice lost (in deviations)."""
    best, same = want.topk(2).values, got.argmax(-1) == want.argmax(-1)
    lead = ((best[:, 0] - best[:, 1]) / want.std(-1))[~same]
    return {
        "num_equal_tokens": int(same.long().cumprod(0).sum()),
        "num_equal_choices": int(same.sum()),
        "logit_difference": float(((got - want).std(-1) / want.std(-1)).max()),
        "first_logit_difference": float((got - want)[0].std() / want[0].std()),
        "largest_lead_lost": float(lead.max()) if len(lead) else 0.0,
    }


def scanned(evidence: list[TierOutput | None]) -> float | None:
    """Keys read in full over valid keys, in a step of all layers; None where there is no evidence."""
    tables = [step.counts for step in evidence if step is not None]
    if not tables:
        return None
    counted = dict(zip(COUNTS, torch.cat(tables).sum((0, 1)).tolist(), strict=True))
    return (counted["scanned"] + counted["open"]) / counted["keys"]


@torch.no_grad()
def captured_static(model: Any, arguments: dict[str, Any], token: Tensor, held: int) -> Callable[[int], None]:
    """Greedy decoding over a StaticCache, whose length is on the device as it is, in a graph."""
    token, position = token[:, None].clone(), torch.full((1, 1), held, device=token.device)

    def step() -> None:
        logits = model(token, position_ids=position, **arguments).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        position.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def decode(new_tokens: int) -> None:
        for _ in range(new_tokens):
            graph.replay()

    decode(2)
    return decode


def elapsed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)
