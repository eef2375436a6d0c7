"""SketchPages: a layer's sketch kept page by page, for a cache whose pages an engine hands from request to request.

An engine with a paged cache never says that a page has a new owner; the new owner simply writes into it. So the rule is: a write
into a page makes its sketch stale, and a stale sketch is made again from the whole page before anything relies on it. A page
that several requests share is sketched once. Guarantee: exact, as long as every write is reported and only pages that lie wholly
below a row's length are asked for. Cost: one encoding per page and owner; a byte per page that says which are stale.

The metric and the mean value are those of the first pages encoded and stay for good: pages outlive the requests that filled
them, so nothing may depend on who asks.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import ShapeError
from louver.kernels import get_ops, resolve_backend
from louver.shapes import Cache, PerRow
from louver.sketch.layout import PER_BLOCK, Sketch, SketchConfig, empty_sketch

PAGES_AT_ONCE = 256  # bounds what encoding a long prompt holds twice


class SketchPages:
    """The sketch of every page of a paged cache [num_pages, num_kv_heads, page_len, head_dim].

    Args:
        num_pages, num_kv_heads, page_len, head_dim: of the cache.
        device: where the cache is.
        config: how pages are sketched; its frame_len divides page_len (speed only).
        backend: which kernels encode and read (speed only).

    Raises:
        ShapeError: frame_len does not divide page_len.
    """

    def __init__(
        self,
        num_pages: int,
        num_kv_heads: int,
        page_len: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        config: SketchConfig | None = None,
        backend: str = "auto",
    ) -> None:
        config = config or SketchConfig()
        if page_len % config.frame_len:
            raise ShapeError(
                f"frame_len={config.frame_len} does not divide the cache's page_len={page_len}; "
                "choose a frame_len of 64 or 128 and a page length that is a multiple of it"
            )
        self.page_len = page_len
        self.backend = resolve_backend(backend, device)
        # One row, whose weight and mean stand for every row's.
        pool = empty_sketch(
            config, num_pages, num_kv_heads, head_dim, torch.device(device), page_len // config.frame_len
        )
        row = {name: x[:1].clone() for name, x in pool.tensors() if name not in PER_BLOCK}
        self._pool = replace(pool, **row)
        self._per_row = [pool.query_weight[:0], pool.value_mean[:0]]  # repeated for the rows of the last step
        self._fresh = torch.zeros(num_pages, dtype=torch.bool, device=device)
        self._has_mean = False
        self.num_encoded = 0  # pages, each time one was

    @property
    def frames_per_page(self) -> int:
        """Blocks of the sketch in one page."""
        return self._pool.capacity

    def wrote(self, pages: Int[Tensor, " written"]) -> None:
        """Somebody wrote into these pages (repeats and numbers below 0 are allowed): their sketches are stale."""
        self._fresh[pages.clamp_min(0)] = False

    def refresh(self, pages: Int[Tensor, " needed"], keys: Cache, values: Cache) -> int:
        """Make the sketches of these full pages current, from the cache as it is now; returns how many were stale.

        keys and values are the whole cache, [num_pages, num_kv_heads, page_len, head_dim] with any strides.
        """
        stale = pages[~self._fresh[pages]].unique()
        if not self._has_mean and len(stale):
            self._fix_mean(values[stale])
        for some in stale.split(PAGES_AT_ONCE):
            self._encode(some, keys, values)
        self._fresh[stale] = True
        self.num_encoded += len(stale)
        return len(stale)

    def rows(self, pages: Int[Tensor, "batch table_width"], num_blocks: PerRow) -> Sketch:
        """The sketch of rows that find their blocks in these pages (int32); the first num_blocks of each must be current."""
        pool, batch = self._pool, len(num_blocks)
        if len(self._per_row[0]) != batch:
            self._per_row = [x.expand(batch, -1, -1).contiguous() for x in (pool.query_weight, pool.value_mean)]
        weight, mean = self._per_row
        return replace(pool, num_blocks=num_blocks, query_weight=weight, value_mean=mean, pages=pages)

    def memory_bytes(self) -> int:
        """Bytes held, for all pages."""
        return self._pool.memory_bytes() + self._fresh.numel()

    def _fix_mean(self, values: Float[Tensor, "some num_kv_heads page_len head_dim"]) -> None:
        clean = torch.nan_to_num(values.float(), nan=0.0, posinf=0.0, neginf=0.0)
        mean = clean.mean((0, 2)).clamp(-1e30, 1e30)
        self._pool.value_mean[0, :, : mean.shape[-1]] = mean
        self._has_mean = True
        self._per_row = [x[:0] for x in self._per_row]

    def _encode(self, pages: Tensor, keys: Cache, values: Cache) -> None:
        pool, count = self._pool, len(pages)
        made = empty_sketch(pool.config, count, keys.shape[1], pool.head_dim, keys.device, pool.capacity)
        made.query_weight.copy_(pool.query_weight.expand_as(made.query_weight))
        made.value_mean.copy_(pool.value_mean.expand_as(made.value_mean))
        zero = torch.zeros(count, dtype=torch.int32, device=keys.device)
        table = pages.to(torch.int32)[:, None].contiguous()
        get_ops(self.backend).encode_block(keys, values, made, zero, zero + self.page_len, table)
        for name, x in made.tensors():
            if name in PER_BLOCK:
                getattr(pool, name)[pages] = x
