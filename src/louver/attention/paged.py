"""Decode steps of one layer over a paged cache that an engine owns: no copy of it, no say in who holds which page.

The engine reports what it writes (``wrote``) and asks for the attention of rows that find their tokens through a block table
(``attend``). Pages that lie wholly below a row's length are read through their sketches; the page that is still filling is
attended exactly. Guarantee: that of the policy, per row, whatever pages were before and whoever shares them now.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from louver.attention.sparse import result_of
from louver.errors import PolicyError
from louver.index.pages import SketchPages
from louver.kernels import get_ops
from louver.policies.base import Dense
from louver.policies.spec import parse
from louver.protocols import AttendResult, CutRule, Policy
from louver.shapes import Cache, PerRow, Query
from louver.sketch.layout import SketchConfig


@dataclass(frozen=True, kw_only=True)
class PagedRows:
    """The rows of one decode step, the same for all layers that share a block table."""

    block_table: Int[Tensor, "batch table_width"]  # int32, contiguous
    kv_start: PerRow  # int32, zeros
    kv_len: PerRow  # int32, the token being decoded included
    num_pages: PerRow  # int32, full pages of each row
    full_pages: Int[Tensor, " full"]  # int64, those pages, each once

    @classmethod
    def of(cls, block_table: Tensor, kv_len: Tensor, page_len: int, longest: int) -> "PagedRows":
        """Rows from an engine's block table [batch, any width] and lengths; longest is at least the largest length."""
        table = block_table[:, : max(1, -(-longest // page_len))].to(torch.int32).contiguous()
        kv_len = kv_len.to(torch.int32).contiguous()
        num_pages = kv_len // page_len
        full = torch.arange(table.shape[1], device=table.device) < num_pages[:, None]
        return cls(
            block_table=table,
            kv_start=torch.zeros_like(kv_len),
            kv_len=kv_len,
            num_pages=num_pages,
            full_pages=table[full].long().unique(),
        )


class PagedAttention:
    """Serves one layer's decode steps from pages. Not a LayerAttention: it owns neither keys nor values.

    Args:
        policy: what a step keeps; a specification or a policy (results). One that kernels resolve themselves: exact:F, topk:K,
            budget:F, fixed:X.
        num_pages, num_kv_heads, page_len, head_dim: of the cache.
        device: where the cache is.
        config: how pages are sketched (speed only).
        backend: which kernels; "auto" is the fastest the device has (speed only).

    Raises:
        PolicyError: the policy needs more than one look at the bounds, or is dense.
        ShapeError: config.frame_len does not divide page_len.
    """

    def __init__(
        self,
        policy: str | Policy,
        num_pages: int,
        num_kv_heads: int,
        page_len: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        config: SketchConfig | None = None,
        backend: str = "auto",
    ) -> None:
        self.policy, self._rule = check_policy(policy)
        self.pages = SketchPages(
            num_pages, num_kv_heads, page_len, head_dim, device=device, config=config, backend=backend
        )

    def wrote(self, slots: Int[Tensor, " tokens"]) -> None:
        """Tokens were written at these slots (page * page_len + offset; below 0: nowhere)."""
        self.pages.wrote(slots.div(self.pages.page_len, rounding_mode="floor"))

    def attend(
        self, q: Query, keys: Cache, values: Cache, rows: PagedRows, softmax_scale: float, record: bool = False
    ) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim], one token per row.

        keys and values are the whole cache, [num_pages, num_kv_heads, page_len, head_dim], with strides of their own. A query
        that is not finite is no error here: it gets what dense attention would give it, and its neighbours are unharmed.
        record: fill exact_mask [batch, num_q_heads, table_width * page_len].
        """
        policy, q = self.policy, q.resolve_neg()  # kernels read memory
        self.pages.refresh(rows.full_pages, keys, values)
        sketch = self.pages.rows(rows.block_table, rows.num_pages * self.pages.frames_per_page)
        step = get_ops(self.pages.backend).step(
            q, keys, values, sketch, self._rule, rows.kv_start, rows.kv_len, softmax_scale, policy.sinks, policy.recent,
            True, record, rows.block_table,
        )  # fmt: skip
        return result_of(step, sketch, policy)

    def memory_bytes(self) -> int:
        """Bytes the sketches of all pages take."""
        return self.pages.memory_bytes()


def check_policy(policy: str | Policy) -> tuple[Policy, CutRule]:
    """The policy and its rule.

    Raises:
        PolicyError: the policy cannot be read, or is none that a step over pages can follow.
    """
    policy = parse(policy)
    rule = None if isinstance(policy, Dense) else policy.rule()
    if rule is None:
        raise PolicyError(
            f"policy={policy.spec!r} can't be followed over a paged cache; wanted one that the kernels resolve in a single look, "
            "such as 'exact:0.01', 'budget:0.05', 'topk:64' or 'fixed:X'"
        )
    return policy, rule
