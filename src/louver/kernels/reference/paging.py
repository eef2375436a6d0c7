"""Reading a paged cache: the reference gathers the pages; fast backends index them in place."""

from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, None, Tensor | None)


def contiguous(x: MaybeTensor, block_table: Int[Tensor, "batch pages"] | None) -> MaybeTensor:
    """x itself, or pages [num_pages, heads, page_len, head_dim] (any strides) laid out as [batch, heads, kv_len, head_dim].

    block_table[row, i] is the page that holds tokens i * page_len onwards. Entries past a row's length may be anything in range.
    """
    if x is None or block_table is None:
        return x
    rows = x[block_table.long().clamp_min(0)]  # batch pages heads page_len head_dim
    return rows.transpose(1, 2).flatten(2, 3)
