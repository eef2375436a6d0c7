"""The fused step with everything settled but the query: one call a step, for steps that follow one another over the same memory."""

from typing import Any

import torch

from louver.kernels import crossover
from louver.kernels.cpu import native
from louver.kernels.cpu.attend import EVIDENCE, rule_values
from louver.kernels.cpu.crossover import most_tokens
from louver.kernels.cpu.native import Cache, share
from louver.protocols import COUNTS, CutRule
from louver.shapes import PerRow, Query
from louver.sketch.layout import Sketch

tensor_of: Any = torch._C._from_dlpack  # pyright: ignore[reportAttributeAccessIssue] - the public one looks for more first


def prepare(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    rule: CutRule,
    kv_start: PerRow,
    softmax_scale: float,
    sinks: int,
    recent: int,
    keep_best: bool,
) -> Any:
    """The step of queries like q over whole buffers of keys and values.

    ``step(share(q), tokens, *addresses, num_threads)``, addresses of keys, values, kv_start and kv_len [batch], gives the
    output's capsule and the piece that it is a part of (``parts_of``), which torch.from_dlpack takes. None, with nothing computed, where q is of
    another kind or not finite, a row is short (kernels/cpu/crossover.py) or begins elsewhere, a block is not encoded yet, or the keys
    or values moved. Keys and values are not kept alive.
    """
    most = most_tokens(keys.shape[3], keys.element_size()) if crossover.enabled else -1.0
    return native.load().PreparedStep(
        native.sketch_view(sketch), share(q.contiguous()), share(keys), share(values), share(kv_start), softmax_scale,
        rule_values(rule, sinks, recent, keep_best), most, native.isa,
    )  # fmt: skip


def parts_of(q: Query, num_kv_heads: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what a prepared step leaves, in the order it lies in."""
    counts = {"counts": (torch.int64, (q.shape[0], num_kv_heads, len(COUNTS)))}
    evidence = {name: (torch.float32, tuple(q.shape[:2])) for name in EVIDENCE}
    return counts | evidence | {"out": (q.dtype, tuple(q.shape))}
