"""Left padding, read from the boolean masks that transformers builds.

transformers states padding as a mask [batch, 1, q_len, kv_len]; Louver's parts want one number per row, ``kv_start``. The last
query of a call sees every valid token, so its mask row decides: it must be False up to kv_start and True from there on. Reading
a mask costs one synchronisation with the device, and all full-attention layers of a step get the same mask object, so the
answer is kept by identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Padding tokens at the left of each row: on the device as kv_start int32 [batch], and on the host as counts."""

    kv_start: Tensor | None = None
    counts: tuple[int, ...] = ()

    def select(self, ids: Tensor) -> "Padding":
        """The padding of the rows ids."""
        if self.kv_start is None:
            return self
        counts = tuple(self.counts[i] for i in ids.tolist())
        return Padding(self.kv_start[ids.to(self.kv_start.device)], counts) if any(counts) else NO_PADDING

    def grows_to(self, other: "Padding", kv_len: int) -> bool:
        """Whether other differs only in rows whose every token was padding when there were kv_len."""
        if self.counts == other.counts:
            return False
        rows = max(len(self.counts), len(other.counts))
        mine, theirs = (counts or (0,) * rows for counts in (self.counts, other.counts))
        if len(mine) != len(theirs):
            return False  # a mask of another batch
        return all(a == b or kv_len <= min(a, b) for a, b in zip(mine, theirs, strict=True))


NO_PADDING = Padding()


def read_padding(mask: Tensor | None) -> Padding | None:
    """The left padding that mask [batch, 1, q_len, kv_len] states for its last query; None if it states anything else."""
    if mask is None:
        return NO_PADDING
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    valid = mask[:, 0, -1]
    kv_len = valid.shape[1]
    kv_start = kv_len - valid.sum(-1, dtype=torch.int32)
    is_suffix = (valid == (torch.arange(kv_len, device=valid.device) >= kv_start[:, None])).all()
    *counts, suffix = torch.cat([kv_start, is_suffix[None].to(torch.int32)]).tolist()
    if not suffix:
        return None
    return Padding(kv_start, tuple(counts)) if any(counts) else NO_PADDING


def is_causal(mask: Tensor, padding: Padding) -> bool:
    """Whether every row of mask [batch, 1, q_len, kv_len] is the last one, cut after its own token."""
    q_len, kv_len = mask.shape[2:]
    position = torch.arange(kv_len, device=mask.device)
    expected = position <= torch.arange(kv_len - q_len, kv_len, device=mask.device)[:, None]
    if padding.kv_start is not None:
        expected = expected & (position >= padding.kv_start[:, None])[:, None]
    return bool((mask[:, 0] == expected).all())


class PaddingReader:
    """``read_padding`` and ``is_causal``, which read each mask tensor once."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._padding: Padding | None = NO_PADDING
        self._causal: bool | None = None  # not asked yet

    def __call__(self, mask: Tensor | None) -> Padding | None:
        """The left padding stated by mask, None if it is no left padding."""
        if mask is None:
            return NO_PADDING
        if mask is not self._mask:
            padding = read_padding(mask)
            if padding is not None and self._padding is not None and padding.counts == self._padding.counts:
                padding = self._padding  # the same tensor as before: what was learned of it on the host still holds
            self._mask, self._padding, self._causal = mask, padding, None
        return self._padding

    def is_causal(self, mask: Tensor | None) -> bool:
        """Whether mask says of each query that it sees every token up to its own and no padding."""
        padding = self(mask)
        if mask is None or padding is None:
            return False  # without a mask, transformers' SDPA takes several queries for the first tokens of the row
        if self._causal is None:
            self._causal = is_causal(mask, padding)
        return self._causal

    def __deepcopy__(self, memo: dict) -> "PaddingReader":
        return PaddingReader()
