"""search, score and attend_selection: native twins of the reference's ops."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import Cache, share
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values
from louver.sketch.layout import Sketch

Csr = tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " selected"], Float[Tensor, " selected"]]


def search(
    q: Query,
    tau: PerQueryHead,
    keys: Cache,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Csr, Int[Tensor, "batch num_kv_heads"]]:
    """Every key whose real score reaches tau; see louver.kernels.reference.search."""
    scanned = torch.empty(q.shape[0], keys.shape[1], dtype=torch.int64)
    found = native.load().search(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(kv_start), share(kv_len),
        share(block_table), share(tau.contiguous()), share(scanned), native.num_threads(), native.isa,
    )  # fmt: skip
    return found, scanned


def score(
    q: Query, keys: Keys, indptr: Int[Tensor, " rows_plus_1"], indices: Int[Tensor, " selected"]
) -> Float[Tensor, " selected"]:
    """Exact scores (float32) of the keys a CSR selection names."""
    scores = torch.empty(indices.numel())
    native.load().score(
        share(q.contiguous()),
        share(keys),
        share(indptr),
        share(indices),
        share(scores),
        native.num_threads(),
        native.isa,
    )
    return scores


def attend_selection(
    q: Query,
    keys: Keys,
    values: Values,
    indptr: Int[Tensor, " rows_plus_1"],
    indices: Int[Tensor, " selected"],
    softmax_scale: float,
) -> tuple[Query, PerQueryHead]:
    """Exact attention over the keys a CSR selection names; see louver.kernels.reference.attend_selection."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    native.load().attend_selection(
        share(q.contiguous()), share(keys), share(values), share(indptr), share(indices), softmax_scale, share(out),
        share(lse), native.num_threads(), native.isa,
    )  # fmt: skip
    return out, lse
