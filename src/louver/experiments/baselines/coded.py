"""A cache in fewer bits as a LayerAttention: dense attention over what the code gives back, with ``Fp8`` or ``Kivi4``.

Tokens are coded in whole groups of 32, as KIVI does, and the last, incomplete group stays exact. FP8's scale is that of the tokens coded
together, the prompt's and then each group's, which can only help it. The exact tokens are kept for a truncation to bring back, so the
bytes read are those of such a cache and the memory is not. Guarantee: none.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from louver.attention.dense import attend_everything, plain_stats
from louver.attention.on_store import OnStore
from louver.experiments.baselines.fp8 import Fp8
from louver.experiments.baselines.kivi import GROUP, Kivi4
from louver.kv.device import DeviceStore
from louver.protocols import AttendResult, Guarantee
from louver.shapes import PerRow, Query, check_query

CODES = {"fp8": Fp8, "kivi4": Kivi4}


class CodedAttention(OnStore):
    """Attends every key, as its code gives it back.

    Args:
        code: how keys and values are held (results).
        reserve_tokens: allocate this many tokens at once (speed only).
    """

    guarantee: ClassVar[Guarantee] = "none"

    def __init__(self, code: Fp8 | Kivi4, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.code = code
        self._coded = DeviceStore()

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Note the padding; coding waits for the first step, when the whole prompt is there."""
        if kv_start is not None:
            self.store.kv_start = kv_start

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim] over coded keys and values, and the exact last ones."""
        check_query(q, self.store.keys)
        self.observe(q, kv_start, softmax_scale)
        keys, values = self._seen()
        seen = DeviceStore.wrap(keys, values, self.store.kv_start, self.store.kv_len)
        found = attend_everything(q, seen, values, softmax_scale, self.record)
        num_keys, head_dim = found.stats.num_keys, keys.shape[3]
        num_exact = num_keys.clamp(max=keys.shape[2] - len(self._coded))
        coded_bytes = (num_keys - num_exact) * (4 * head_dim * self.code.bytes_fraction(head_dim))
        nothing = torch.zeros(q.shape[:2], device=q.device)
        return AttendResult(
            out=found.out,
            lse=found.lse,
            stats=replace(
                plain_stats(num_keys, num_exact, num_exact, head_dim), index_bytes=coded_bytes.round().long()
            ),
            certificate=nothing + torch.inf,
            arithmetic_bound=nothing,
            dropped_mass_bound=nothing,
            tau=nothing + torch.inf,
            exact_mask=found.exact_mask,
        )

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.store.truncate(kv_len)
        self._coded.truncate(kv_len // GROUP * GROUP)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        self.store.select_batch(ids)
        self._coded.select_batch(ids)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name: the exact tokens, and as ``index`` the coded ones."""
        return {"keys_values": self.store.memory_bytes(), "index": self._coded.memory_bytes()}

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the code gives them back, the exact ones of the last group behind them."""
        keys, values = self.store.keys, self.store.values
        assert values is not None
        done, end = len(self._coded), len(self.store) // GROUP * GROUP
        if end > done:
            parts = [x[:, :, done:end] for x in (keys, values)]
            coded = self.code.coded(*(x.flatten(0, 1).float() for x in parts))
            self._coded.append(*(x.view(parts[0].shape).to(parts[0].dtype) for x in coded))
        held = self._coded.values
        if held is None:
            return keys, values
        return torch.cat([self._coded.keys, keys[:, :, end:]], 2), torch.cat([held, values[:, :, end:]], 2)
