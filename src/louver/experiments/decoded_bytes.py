"""What a decode through a LouverCache really reads, step by step: the measurement beside a prediction from captured queries.

The text but for its last tokens is prefilled densely, those are then decoded one by one, and the cache's own counts are read.
"""

from typing import Any

from torch import Tensor

from louver.experiments.decoding import decode, prefill
from louver.experiments.experiment import Progress, no_progress


def decoded_bytes(
    model: Any, ids: Tensor, policy: str, num_steps: int, backend: str = "auto", on_progress: Progress = no_progress
) -> tuple[Any, list[Any]]:
    """Decode the last num_steps tokens of ids [1, kv_len] by a policy; totals (a Summary), and each served layer's (LayerSummary)."""
    from louver.integrations.transformers import attach

    cache = attach(model, policy=policy, backend=backend)
    first = ids.shape[1] - num_steps
    done = 0

    def advance(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        on_progress("Reading the text into a cache", done, first)

    def count(_: int) -> None:
        on_progress("Decoding its end", cache.summary().num_steps // len(cache.served_layers), num_steps)

    try:
        prefill(model, cache, ids[:, :first], advance)
        fed = ids[0, first:].tolist()
        decode(model, cache, fed[0], num_steps, forced=[*fed[1:], 0], on_token=count)
    finally:
        model.set_attn_implementation("sdpa")
    return cache.summary(), cache.stats.per_layer()
