"""A cache in fewer bits as a LayerAttention: dense attention over what the code gives back, with ``Fp8`` or ``Kivi4``.

The exact keys and values are kept and coded anew at every step, so the figures are those of such a cache and the time is not. Guarantee:
none.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from louver.attention.dense import DenseAttention, attend_everything
from louver.errors import ShapeError
from louver.experiments.baselines.fp8 import Fp8
from louver.experiments.baselines.kivi import Kivi4
from louver.kv.device import DeviceStore
from louver.protocols import AttendResult, Guarantee
from louver.shapes import PerRow, Query, check_query


class CodedAttention(DenseAttention):
    """Attends every key, as its code gives it back. One row without padding.

    Args:
        code: how keys and values are held (results).
        reserve_tokens: allocate this many tokens at once (speed only).
    """

    guarantee: ClassVar[Guarantee] = "none"

    def __init__(self, code: Fp8 | Kivi4, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.code = code

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Attention of q [1, num_q_heads, head_dim] over the tokens held.

        Raises:
            ShapeError: there is more than one row, or padding.
        """
        check_query(q, self.store.keys)
        if q.shape[0] != 1 or (kv_start is not None and bool(kv_start.any())):
            raise ShapeError("a coded cache serves a single row without padding; wanted batch=1 and kv_start=0")
        values = self.store.values
        assert values is not None
        keys, values = self.code.coded(self.store.keys[0].float(), values[0].float())
        coded = DeviceStore.wrap(keys[None], values[None])
        dense = attend_everything(q.float(), coded, values[None], softmax_scale, self.record)
        bytes_dense = dense.stats.bytes_dense
        stats = replace(
            dense.stats,
            table=_only_keys(dense.stats.table),
            index_bytes=(bytes_dense * self.code.bytes_fraction(q.shape[2])).round().long(),
        )
        nothing = torch.zeros(q.shape[:2], device=q.device)
        return AttendResult(
            out=dense.out.to(q.dtype),
            lse=nothing,
            stats=stats,
            certificate=nothing + torch.inf,
            arithmetic_bound=nothing,
            dropped_mass_bound=nothing,
            tau=nothing + torch.inf,
            exact_mask=dense.exact_mask,
        )


def _only_keys(table: Tensor) -> Tensor:
    """Counts of a step that reads no key in full."""
    return torch.cat([table[..., :1], torch.zeros_like(table[..., 1:])], -1)
