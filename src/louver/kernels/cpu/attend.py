"""step and attend_dense: native twins of the reference's ops."""

import torch
from jaxtyping import Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.kernels.ops import TierOutput
from louver.protocols import COUNTS, CutRule
from louver.shapes import PerQueryHead, PerRow, Query
from louver.sketch.layout import Sketch


def attend_dense(
    q: Query,
    keys: Cache,
    values: Cache,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Query, PerQueryHead]:
    """Exact attention over every valid token; see louver.kernels.reference.attend_dense."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    native.load().attend_dense(
        share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len), share(block_table),
        softmax_scale, share(out), share(lse), native.num_threads(), native.isa,
    )  # fmt: skip
    return out, lse


def step(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    rule: CutRule,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int = 0,
    recent: int = 0,
    keep_best: bool = False,
    record: bool = False,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> TierOutput:
    """One decode step under a rule, fused; see louver.kernels.reference.step."""
    batch, num_q_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    evidence = torch.empty(5, batch, num_q_heads)
    counts = torch.empty(batch, keys.shape[1], len(COUNTS), dtype=torch.int64)
    mask = None
    if record:
        width = keys.shape[2] * (1 if block_table is None else block_table.shape[1])
        mask = torch.zeros(batch, num_q_heads, width, dtype=torch.bool)
    native.load().step(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), share(kv_len),
        share(block_table), softmax_scale, (rule.drop, rule.share, rule.count, rule.tau, rule.unread_mass, sinks, recent, keep_best),
        share(out), share(evidence), share(counts), None if mask is None else share(mask.view(torch.uint8)),
        native.num_threads(), native.isa,
    )  # fmt: skip
    lse, certificate, arithmetic, dropped, tau = evidence.unbind()
    return TierOutput(
        out=out,
        lse=lse,
        certificate=certificate,
        arithmetic_bound=arithmetic,
        dropped_mass_bound=dropped,
        tau=tau,
        counts=counts,
        exact_mask=mask,
    )
