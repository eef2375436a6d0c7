"""An observer that repeats every decode step of every layer in float64 by brute force and keeps what it finds.

It knows nothing of bounds: it reads the stored keys and values, scores all of them, and compares. A false negative is a key
whose true score reaches the step's tau and that was not treated exactly; a bound violation is a query and head whose true
output is further away than certificate + arithmetic_bound.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from louver.protocols import AttendResult
from louver.shapes import group_heads

STAGES = ("keys", "scanned", "exact", "coarse", "unread")


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """One layer at one step, against the truth. Tensors are [batch, num_q_heads], float64, on the CPU."""

    layer: int
    num_relevant: int  # keys whose true score reaches tau, over rows and heads
    num_false_negatives: int
    num_bound_violations: int
    output_error: Tensor  # |o - out| / |o|
    output_error_bound: Tensor  # (certificate + arithmetic_bound) / |o|
    arithmetic_bound: Tensor  # arithmetic_bound / |o|
    dropped_mass: Tensor  # true softmax mass of the keys a dropping policy left out; 0 for others
    dropped_mass_bound: Tensor
    counts: dict[str, int]  # by the names of STAGES, over rows and KV heads
    bytes_read: int
    bytes_dense: int
    num_layer_exact: int  # distinct tokens that any head of the layer took exactly


@dataclass
class Audit:
    """Set ``cache.observer`` to one of these before decoding; read ``steps`` afterwards."""

    drops: bool  # the policy's: whether keys that are not exact are left out
    steps: list[LayerStep] = field(default_factory=list)
    exact_positions: dict[int, Tensor] = field(default_factory=dict)  # layer -> how often each token was exact, int64
    elapsed_ms: float = 0.0  # spent in here, which is not the decoder's time

    def __call__(self, layer_idx: int, q: Tensor, result: AttendResult, layer: Any, softmax_scale: float) -> None:
        """Check one decode step of one layer; the signature is that of LouverCache's observer."""
        started = time.perf_counter()
        self._check(layer_idx, q, result, layer, softmax_scale)
        self.elapsed_ms += 1e3 * (time.perf_counter() - started)

    def _check(self, layer_idx: int, q: Tensor, result: AttendResult, layer: Any, softmax_scale: float) -> None:
        store, mask = layer.store, result.exact_mask
        assert mask is not None, "the cache fills exact_mask while an observer is set"
        scores, truth = exact_attention(q, store, softmax_scale)
        relevant = scores >= result.tau.double()[..., None]
        error = (truth - result.out.double()).norm(dim=-1)
        bound = result.certificate.double() + result.arithmetic_bound.double()
        norm = truth.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        weights = (scores * softmax_scale).softmax(-1)
        dropped = (weights * ~mask).sum(-1) if self.drops else torch.zeros_like(norm)
        self.steps.append(
            LayerStep(
                layer=layer_idx,
                num_relevant=int(relevant.sum()),
                num_false_negatives=int((relevant & ~mask).sum()),
                num_bound_violations=int((~(error <= bound)).sum()),
                output_error=(error / norm).cpu(),
                output_error_bound=(bound / norm).cpu(),
                arithmetic_bound=(result.arithmetic_bound.double() / norm).cpu(),
                dropped_mass=dropped.cpu(),
                dropped_mass_bound=result.dropped_mass_bound.double().cpu(),
                counts={name: int(getattr(result.stats, f"num_{name}").sum()) for name in STAGES},
                bytes_read=int(result.stats.bytes_read.sum()),
                bytes_dense=int(result.stats.bytes_dense.sum()),
                num_layer_exact=int(mask.any(dim=1).sum()),
            )
        )
        self._add_positions(layer_idx, mask.sum(dim=(0, 1)).cpu())

    def _add_positions(self, layer_idx: int, taken: Tensor) -> None:
        before = self.exact_positions.get(layer_idx)
        if before is not None:
            taken[: len(before)] += before
        self.exact_positions[layer_idx] = taken


def exact_attention(q: Tensor, store: Any, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Scores [batch, num_q_heads, kv_len] (-inf for padding) and output [batch, num_q_heads, head_dim], in float64."""
    keys, values = store.keys.double(), store.values.double()
    position = torch.arange(keys.shape[2], device=keys.device)
    valid = (position >= store.kv_start[:, None]) & (position < store.kv_len[:, None])
    scores = group_heads(q.double(), keys.shape[1]) @ keys.mT
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    out = (scores * softmax_scale).softmax(-1) @ values
    return scores.flatten(1, 2), out.flatten(1, 2)
