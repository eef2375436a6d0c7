"""Exact keys and values in the host's RAM, read from there by a model on a GPU.

A step reads the sketch, which stays on the GPU, and of the exact keys and values only those its bounds ask for. They lie in
page-locked memory that the GPU addresses like its own, so the same kernels read them across the bus, each key once for its
whole GQA group, and nothing is gathered, padded or staged. The price of a key is the bus (some 50 GB/s) in place of the GPU's memory (some
3,000 GB/s), so what a policy reads exactly is what a step costs.

A prompt's tokens are written to the host on a stream of their own while the model goes on; until ``settle``, the prompt is attended
and encoded from the tensors the model just made. Without a GPU this is a DeviceStore in RAM.
"""

from functools import lru_cache

import torch
from torch import Tensor

from louver.kv.device import DeviceStore, Place
from louver.kv.pinned import pinned_tensor
from louver.shapes import Keys, Values

DECODED_TOKENS = 16  # new tokens at once that count as decoding; more are a prompt, or a part of one


class HostStore(DeviceStore):
    """A KVStore in page-locked host memory. Its ``keys`` and ``values`` are tensors on the model's device all the same.

    Growing moves every token (a quarter more room each time), and page-locking memory takes a while:
    ``reserve_tokens`` spares a long generation both.

    Args:
        reserve_tokens: allocate this many tokens at once (speed only, never results).
    """

    def __init__(self, *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self._prompt: tuple[Tensor, Tensor | None] | None = None  # every token held, on the GPU, until settle()
        self._written: torch.cuda.Event | None = None  # when the copy of the last prompt is complete

    @property
    def place(self) -> Place:
        """Always ``"host"``."""
        return "host"

    @property
    def keys(self) -> Keys:
        """A view [batch, num_kv_heads, kv_len, head_dim] of the keys held."""
        if self._prompt is not None:
            return self._prompt[0]
        self._await_copy()
        return super().keys

    @property
    def values(self) -> Values | None:
        """A view [batch, num_kv_heads, kv_len, head_dim] of the values held, None if there are none."""
        if self._prompt is not None:
            return self._prompt[1]
        self._await_copy()
        return super().values

    def append(self, keys: Tensor, values: Tensor | None) -> None:
        """Add tokens [batch, num_kv_heads, new_len, head_dim] at the end of every row.

        Raises:
            ShapeError: the tokens do not fit what the store already holds, or its rows end at different positions.
        """
        if keys.dim() != 4 or keys.shape[2]:
            self.settle()
        super().append(keys, values)

    def settle(self) -> None:
        """Give back the GPU's copy of the prompt just appended: it has been attended and indexed."""
        self._prompt = None

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on; a longer kv_len than the store holds changes nothing."""
        self.settle()
        super().truncate(kv_len)

    def clear(self) -> None:
        """Give the buffers back; the next append decides shapes anew."""
        self.settle()
        self._await_copy()
        super().clear()

    def _write(self, keys: Tensor, values: Tensor | None, end: int) -> None:
        if not keys.is_cuda or keys.shape[2] <= DECODED_TOKENS:
            self._await_copy()
            super()._write(keys, values, end)
            return
        before = (super().keys, super().values)
        self._await_copy()
        held = [
            new[:] if not self._len else torch.cat([old, new], 2)
            for old, new in zip(before, (keys, values), strict=True)
            if old is not None and new is not None
        ]
        stream = _copy_stream(keys.device)
        stream.wait_stream(torch.cuda.current_stream(keys.device))
        with torch.cuda.stream(stream):
            super()._write(keys, values, end)
            for x in (keys, values):
                if x is not None:
                    x.record_stream(stream)
            self._written = torch.cuda.Event()
            self._written.record(stream)
        self._prompt = (held[0], None if values is None else held[1])

    def _await_copy(self) -> None:
        if self._written is not None:
            assert self._keys is not None
            torch.cuda.current_stream(self._keys.device).wait_event(self._written)
            self._written = None

    def _resize(self, capacity: int, ids: Tensor | None = None) -> None:
        self.settle()
        self._await_copy()
        super()._resize(capacity, ids)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return super()._allocate(shape, dtype, device)
        return pinned_tensor(shape, dtype, device)


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
