"""Quest: the pages of 16 tokens whose bounding box promises the highest score.

Source: Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774. A page's box is the channel-wise
minimum and maximum of its keys; its promise is the sum over channels of max(q·low, q·high), an upper bound on every score in
it. The budget then takes the best pages, however many more could hold a large score, so nothing is guaranteed. The page being filled is
always taken. Cost: two vectors per page, and the tokens of the pages taken. (The paper leaves the first two layers dense: see
``served``.)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from louver.experiments.baselines.selecting import HeadMask, RowMask, Selecting, check_budget, num_kept, top
from louver.shapes import Query, group_heads

PAGE_TOKENS = 16


class Quest(Selecting):
    """Attends the pages that ``budget`` (a share of the tokens, or a number of them) pays for, rounded up to whole pages."""

    def __init__(self, budget: float | int, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.budget = check_budget(budget)
        self._full: tuple[Tensor, Tensor] | None = None  # low and high of the full pages, and for which padding
        self._padding: Tensor | None = None

    def select(self, q: Query, valid: RowMask, softmax_scale: float) -> HeadMask:
        """The same budget for every query head, each with pages of its own."""
        promise = page_promises(q, *self._boxes(valid))
        promise[..., -1] = torch.inf  # the page being filled
        tokens = num_kept(self.budget, valid.sum(-1))
        pages = top(promise, (-(-tokens // PAGE_TOKENS))[:, None].expand(promise.shape[:2]))
        return (pages.repeat_interleave(PAGE_TOKENS, -1)[..., : len(self.store)]) | (self.budget == 1.0)

    def index_bytes(self, valid: RowMask) -> Tensor:
        """A box of two 16-bit vectors per page."""
        _, num_kv_heads, length, head_dim = self.store.keys.shape
        boxes = -(-length // PAGE_TOKENS) * 2 * 2 * head_dim
        return torch.full((valid.shape[0], num_kv_heads), boxes, device=valid.device)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        super().truncate(kv_len)
        if self._full is not None:
            self._full = (self._full[0][:, :, : kv_len // PAGE_TOKENS], self._full[1][:, :, : kv_len // PAGE_TOKENS])

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        super().select_batch(ids)
        self._full = None

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name; ``index`` is the boxes."""
        boxes = 0 if self._full is None else 2 * self._full[0].numel() * self._full[0].element_size()
        return super().memory_bytes() | {"index": boxes}

    def _boxes(self, valid: RowMask) -> tuple[Tensor, Tensor]:
        """Low and high of every page; full pages are computed once."""
        keys = self.store.keys
        if self._full is None or self._padding is None or not torch.equal(self._padding, self.store.kv_start):
            self._full, self._padding = (keys[:, :, :0], keys[:, :, :0]), self.store.kv_start.clone()
        done = self._full[0].shape[2] * PAGE_TOKENS
        low, high = page_boxes(keys[:, :, done:], valid[:, done:])
        low, high = torch.cat([self._full[0], low], 2), torch.cat([self._full[1], high], 2)
        whole = keys.shape[2] // PAGE_TOKENS
        self._full = (low[:, :, :whole], high[:, :, :whole])
        return low, high


def page_boxes(keys: Tensor, valid: RowMask) -> tuple[Tensor, Tensor]:
    """Low and high [batch, num_kv_heads, pages, head_dim] of keys' pages; padding takes no part in them."""
    fill = (0, 0, 0, -keys.shape[2] % PAGE_TOKENS)
    inside = torch.nn.functional.pad(valid, (0, fill[3]))[:, None, :, None]
    paged = torch.nn.functional.pad(keys, fill)
    low = paged.masked_fill(~inside, torch.inf).unflatten(2, (-1, PAGE_TOKENS)).amin(3)
    return low, paged.masked_fill(~inside, -torch.inf).unflatten(2, (-1, PAGE_TOKENS)).amax(3)


def page_promises(q: Query, low: Tensor, high: Tensor) -> Float[Tensor, "batch num_q_heads pages"]:
    """An upper bound on the score of every key in each page, -inf where a page holds padding alone."""
    empty = low[..., 0] > high[..., 0]
    grouped = group_heads(q.float(), low.shape[1])
    low, high = (torch.where(empty[..., None], 0.0, box.float()) for box in (low, high))
    # max(q·low, q·high) is q·high where q is positive and q·low where it is negative.
    promise = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
    return promise.masked_fill(empty[:, :, None], -torch.inf).flatten(1, 2)
