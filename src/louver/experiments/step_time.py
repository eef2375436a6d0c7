"""The time of a decode step, predicted from a handful of kernel figures of this device, and measured beside it.

Kernel figures come from ``louver bench``'s own machinery on synthetic keys of the model's shape: dense attention takes
``call + token n``, a step through the sketch ``call + key n + exact (share of exact keys) n``, each fitted to three lengths by least relative
squares. What a step does beside attention is a decode on a short cache, less that cache's attention. A layer's own share of exact keys,
from the profile, and the library's own dispatch to dense below its crossover then give the step at any length. CPU only: on a GPU a step is
replayed as one graph, and ``louver bench --device cuda`` measures it as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from louver.experiments import bench
from louver.experiments.decoding import prefill
from louver.experiments.demo import with_policy
from louver.experiments.experiment import Progress, no_progress
from louver.experiments.rows import Row
from louver.kernels import crossover
from louver.kernels.cpu.crossover import most_tokens

SHARES = ("exact:0.002", "exact:0.01", "exact:0.05")  # far enough apart to tell exact keys from scanned ones
SHORT_TOKENS = 64
LONGEST = 2**24  # tokens; a crossover beyond is none


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """Microseconds of one layer's attention on this device."""

    dense_call_us: float
    dense_token_us: float
    sketch_call_us: float
    sketch_key_us: float  # per key held: the scan
    exact_key_us: float  # per key attended exactly, on top of that
    dense_up_to: int  # tokens at which the library's own dispatch still runs dense

    def dense_us(self, kv_len: int) -> float:
        """Dense attention over kv_len tokens."""
        return self.dense_call_us + self.dense_token_us * kv_len

    def sketch_us(self, kv_len: int, exact_fraction: float) -> float:
        """A step through the sketch."""
        return self.sketch_call_us + (self.sketch_key_us + self.exact_key_us * exact_fraction) * kv_len

    def step_us(self, kv_len: int, exact_fraction: float) -> float:
        """What the library runs at that length."""
        return self.dense_us(kv_len) if kv_len <= self.dense_up_to else self.sketch_us(kv_len, exact_fraction)

    def crossover_tokens(self, exact_fraction: float) -> int | None:
        """From how many tokens on the sketch is faster than dense attention; None where it never is."""
        gained = self.dense_token_us - self.sketch_key_us - self.exact_key_us * exact_fraction
        lost = self.sketch_call_us - self.dense_call_us
        if lost <= 0 and gained >= 0:
            return 0
        found = lost / gained if gained > 0 else LONGEST
        return None if found >= LONGEST else round(found)


def kernel_times(shape: tuple[int, int, int], kv_len: int, backend: str, repetitions: int = 9) -> KernelTimes:
    """Measure a layer of shape (num_q_heads, num_kv_heads, head_dim), float32, at up to kv_len tokens."""
    lengths = tuple(sorted({max(512, kv_len // part) for part in (4, 2, 1)}))
    config = bench.Config(
        kv_lens=lengths, shape=shape, dtype="float32", policies=SHARES, repetitions=repetitions, backend=backend
    )
    with crossover.switched(False):
        rows = list(bench.run(config))
    dense = [row for row in rows if row["policy"] == "dense"]
    sketch = [row for row in rows if row["policy"] in SHARES]
    call, token = _fitted([(1, row["kv_len"]) for row in dense], dense)
    parts = [(1, row["kv_len"], row["kv_len"] * row["selected_fraction"]) for row in sketch]
    sketch_call, key, exact = _fitted(parts, sketch)
    dispatched = backend == "cpu" and crossover.enabled
    return KernelTimes(
        dense_call_us=call,
        dense_token_us=token,
        sketch_call_us=sketch_call,
        sketch_key_us=key,
        exact_key_us=exact,
        dense_up_to=int(min(most_tokens(shape[2], 4), LONGEST)) if dispatched else 0,
    )


def _fitted(terms: Sequence[Sequence[float | int]], rows: Sequence[Row]) -> list[float]:
    """Times of the terms, none negative, that fit the rows' latencies with the least relative squares.

    Three terms at most, so all choices of those that are not zero are tried.
    """
    times = torch.tensor([row["latency_us"] for row in rows], dtype=torch.float64)
    scaled = torch.tensor(terms, dtype=torch.float64) / times[:, None]
    ones = torch.ones(len(times), dtype=torch.float64)
    width, best = scaled.shape[1], (float("inf"), [0.0] * scaled.shape[1])
    for chosen in range(1, 2**width):
        columns = [i for i in range(width) if chosen >> i & 1]
        found = torch.linalg.lstsq(scaled[:, columns], ones[:, None], driver="gelsd").solution[:, 0]
        off = float((scaled[:, columns] @ found - ones).square().sum())
        if bool((found >= 0).all()) and off < best[0]:
            whole = [0.0] * width
            for i, value in zip(columns, found.tolist(), strict=True):
                whole[i] = value
            best = (off, whole)
    return best[1]


def beside_attention_ms(model: Any, ids: Tensor, times: KernelTimes, backend: str) -> float:
    """What a decode step takes beside attention: a step after SHORT_TOKENS tokens of ids [1, kv_len], less its attention."""
    from louver.experiments.demo_timing import in_turn
    from louver.integrations.transformers import attach

    cache = attach(model, policy="dense", backend=backend)
    try:
        prefill(model, cache, ids[:, :SHORT_TOKENS])
        fed = ids[0, SHORT_TOKENS : SHORT_TOKENS + 9].tolist()
        taken = in_turn(model, {"dense": cache}, fed[0], fed[1:], lambda token: None)["dense"]
    finally:
        model.set_attn_implementation("sdpa")
    return max(0.0, median(taken) - len(cache.served_layers) * times.dense_us(SHORT_TOKENS) / 1e3)


def decoded_in_turn(
    model: Any, ids: Tensor, policy: str, num_steps: int, backend: str = "auto", on_progress: Progress = no_progress
) -> tuple[Any, list[Any], dict[str, float]]:
    """Decode the last num_steps tokens of ids [1, kv_len] by a policy and densely, in turn, after one reading of the rest.

    Returns:
        The policy's totals (a Summary), each served layer's (LayerSummary), and by way, ``policy`` and ``dense``, the median
        milliseconds of a step.
    """
    from louver.integrations.transformers import attach

    cache = attach(model, policy=policy, backend=backend)
    first = ids.shape[1] - num_steps
    from louver.experiments.demo_timing import in_turn

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
        caches = {"policy": cache, "dense": with_policy(cache, "dense")}
        times = in_turn(model, caches, fed[0], [*fed[1:], 0], count)
    finally:
        model.set_attn_implementation("sdpa")
    return cache.summary(), cache.stats.per_layer(), {name: median(ms) for name, ms in times.items()}
