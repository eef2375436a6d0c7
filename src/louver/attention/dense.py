"""Dense attention behind the LayerAttention seam: the baseline, on the same growable buffers as everything else.

``out`` is torch's scaled_dot_product_attention over every valid key, called the way transformers calls it, so a model decodes
the same tokens as with ``attn_implementation="sdpa"``. Nothing is approximated: the certificate is 0 and only arithmetic is left.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from louver.attention.arithmetic import attention_arithmetic
from louver.attention.on_store import OnStore
from louver.kernels.reference.attend import attend_dense
from louver.kernels.reference.product import true_float32
from louver.kv.device import DeviceStore
from louver.protocols import COUNTS, AttendResult, KVStore, StepStats
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values, check_query, check_scale, group_heads
from louver.sketch.accounting import plain_byte_weights

# Wider heads make torch leave its fused kernels when enable_gqa is set.
_MAX_FUSED_HEAD_DIM = 256


class DenseAttention(OnStore):
    """Attends every valid key exactly. A LayerAttention; the arguments are those of OnStore."""

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Note the padding of the rows; dense attention learns nothing from queries."""
        if kv_start is not None:
            self.store.kv_start = kv_start
        self.store.settle()

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim] over the valid tokens held.

        kv_start int32 [batch] counts the padding tokens at the left of each row; None means none.
        """
        check_query(q, self.store.keys)
        if kv_start is not None:
            self.store.kv_start = kv_start
        values = self.store.values
        assert values is not None
        return attend_everything(q, self.store, values, softmax_scale, self.record)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.store.truncate(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        self.store.select_batch(ids)


def attend_everything(
    q: Query,
    store: KVStore,
    values: Values,
    softmax_scale: float,
    record: bool = False,
    kernel: Callable[..., tuple[Query, PerQueryHead]] | None = None,
) -> AttendResult:
    """Dense attention of q [batch, num_q_heads, head_dim] over every valid token of a store.

    kernel: a backend's op ``attend_dense`` in place of torch's attention.
    """
    keys = store.keys
    kv_len = keys.shape[2]
    if isinstance(store, DeviceStore):
        padded = store.has_padding
    else:
        padded = bool(store.kv_start.any() or (store.kv_len != kv_len).any())
    valid = valid_tokens(store.kv_start, store.kv_len, kv_len) if padded else None
    check_scale(softmax_scale)
    length = (store.kv_len - store.kv_start).clamp_min(0)
    lse = None
    if kernel is None and not q.dtype == keys.dtype == values.dtype:
        kernel = attend_dense  # torch's attention takes one dtype only
    if kernel is not None:  # which multiplies in float32 whatever torch is told to do
        out, lse = kernel(q, keys, values, store.kv_start, store.kv_len, softmax_scale)
    else:
        with true_float32(q.device):
            out = _attend(q, keys, values, valid, softmax_scale)
        if padded or not kv_len:
            out = torch.where(
                (length > 0)[:, None, None], out, 0.0
            )  # of a row without tokens torch makes what it likes
    mask = _exact_mask(q, keys, valid) if record else None
    return DenseResult(q, keys, values, valid, length, softmax_scale, out, mask, lse)


class DenseResult(AttendResult):
    """The result of dense attention, of which everything but ``out`` is made when it is asked for.

    ``lse`` and ``arithmetic_bound`` read the whole cache once more, which would more than double the time of a dense step, and with
    it flatter everything that is measured against one; the rest takes longer than a short step. Ask before the tokens are truncated.
    """

    def __init__(
        self,
        q: Query,
        keys: Keys,
        values: Values,
        valid: Tensor | None,
        length: PerRow,
        softmax_scale: float,
        out: Query,
        exact_mask: Tensor | None,
        lse: PerQueryHead | None = None,
    ) -> None:
        asked = (q, keys, values, valid, length, softmax_scale)
        self.__dict__.update(out=out, exact_mask=exact_mask, _asked=asked)
        if lse is not None:
            self.__dict__["lse"] = lse

    @cached_property
    def stats(self) -> StepStats:  # pyright: ignore[reportIncompatibleVariableOverride] - lazy, the same to read
        """Every valid key and value was read."""
        return dense_stats(*self.read)

    @property
    def read(self) -> tuple[PerRow, int, int]:
        """The arguments of ``dense_stats``: all there is to count of a dense step, and small, where the result holds the cache."""
        _, keys, _, _, length, _ = self.__dict__["_asked"]
        return length, keys.shape[1], keys.shape[3]

    @cached_property
    def certificate(self) -> PerQueryHead:  # pyright: ignore[reportIncompatibleVariableOverride]
        """0: nothing is approximated."""
        return torch.zeros(self.out.shape[:2], device=self.out.device)

    @cached_property
    def dropped_mass_bound(self) -> PerQueryHead:  # pyright: ignore[reportIncompatibleVariableOverride]
        """0: nothing is dropped."""
        return torch.zeros_like(self.certificate)

    @cached_property
    def tau(self) -> PerQueryHead:  # pyright: ignore[reportIncompatibleVariableOverride]
        """-inf: every key was treated exactly."""
        return torch.full_like(self.certificate, -torch.inf)

    @cached_property
    def lse(self) -> PerQueryHead:  # pyright: ignore[reportIncompatibleVariableOverride] - lazy, the same to read
        """Natural log of the sum of e^logit over the valid keys, float32 [batch, num_q_heads]."""
        q, keys, _, valid, _, softmax_scale = self.__dict__["_asked"]
        with true_float32(q.device):
            return _log_sum_exp(q, keys, valid, softmax_scale)

    @cached_property
    def arithmetic_bound(self) -> PerQueryHead:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How far ``out`` can be from real arithmetic, [batch, num_q_heads]."""
        q, keys, values, valid, length, softmax_scale = self.__dict__["_asked"]
        num_terms = length[:, None].expand(q.shape[:2])
        return attention_arithmetic(q, keys, values, softmax_scale, num_terms, valid, self.out)


def valid_tokens(kv_start: PerRow, kv_len: PerRow, longest: int) -> Tensor:
    """Bool [batch, longest]: True from kv_start up to kv_len."""
    position = torch.arange(longest, device=kv_start.device)
    return (position >= kv_start[:, None]) & (position < kv_len[:, None])


def dense_stats(length: PerRow, num_kv_heads: int, head_dim: int) -> StepStats:
    """What a dense step over ``length`` valid tokens reads: every key and value, per row and KV head."""
    num_keys = length[:, None].long().repeat(1, num_kv_heads)
    return plain_stats(num_keys, num_keys, num_keys, head_dim)


def plain_stats(num_keys: Tensor, num_scanned: Tensor, num_exact: Tensor, head_dim: int) -> StepStats:
    """Statistics of a step without a sketch, from int64 [batch, num_kv_heads] counts."""
    columns, nothing = {"keys": num_keys, "scanned": num_scanned, "exact": num_exact}, torch.zeros_like(num_keys)
    table = torch.stack([columns.get(name, nothing) for name in COUNTS], -1)
    return StepStats(table=table, byte_weights=plain_byte_weights(head_dim), head_dim=head_dim, drops=True)


def _attend(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, softmax_scale: float) -> Tensor:
    if valid is None and keys.shape[3] <= _MAX_FUSED_HEAD_DIM:
        out = scaled_dot_product_attention(q[:, :, None], keys, values, scale=softmax_scale, enable_gqa=True)
        return out[:, :, 0]
    # A mask sends enable_gqa to a slow kernel, so the heads of a group become its query tokens.
    mask = None if valid is None else valid[:, None, None]
    grouped = group_heads(q, keys.shape[1])
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=softmax_scale).flatten(1, 2)


def _log_sum_exp(q: Tensor, keys: Tensor, valid: Tensor | None, softmax_scale: float) -> Tensor:
    """Natural log of the sum of e^logit over the valid keys, float32 [batch, num_q_heads]."""
    logits = (group_heads(q.float(), keys.shape[1]) @ keys.float().mT) * softmax_scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.logsumexp(-1).flatten(1)


def _exact_mask(q: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    batch, num_q_heads, kv_len = q.shape[0], q.shape[1], keys.shape[2]
    if valid is None:
        return torch.ones(batch, num_q_heads, kv_len, dtype=torch.bool, device=q.device)
    return valid[:, None].expand(batch, num_q_heads, kv_len)
