"""Exact keys and values in device memory, in buffers that grow by a quarter.

Concatenating all keys and values at every step costs more than attention itself (32,000 tokens on a CPU: 6.2 ms against
3.5 ms), so tokens are written into preallocated buffers and read back as views: appending costs O(new tokens), and growth is
O(1) amortised per token. A view stays valid until its tokens are truncated and written over.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from louver.errors import ShapeError
from louver.kv.history import History
from louver.memory import empty
from louver.shapes import Keys, PerRow, Values, check_keys_values

_ROUND_TOKENS = 64
_NOTHING = torch.empty(0, 0, 0, 0)
_NO_ROWS = torch.empty(0, dtype=torch.int32)

Place = Literal["gpu", "host", "disk"]


class DeviceStore:
    """A KVStore on one device: ``[batch, num_kv_heads, capacity, head_dim]`` buffers, grown by a quarter when full.

    Shapes, dtype and device are those of the first tokens appended. Keys and values keep their dtype: a store never changes
    what it was given. ``values`` may be None throughout (an index for search only).

    Args:
        reserve_tokens: allocate this many tokens at once (speed only, never results).
    """

    def __init__(self, *, reserve_tokens: int = 0) -> None:
        if reserve_tokens < 0:
            raise ShapeError(f"reserve_tokens={reserve_tokens}; wanted 0 or more tokens")
        self.reserve_tokens = reserve_tokens
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._kv_start: Tensor | None = None
        self._kv_len: Tensor | None = None
        self._len = 0  # tokens held by the longest row: the length of the views
        self._ragged = False  # rows end at different positions
        self._padding_known: tuple[Tensor, int, bool] | None = None  # of which kv_start the host knows whether it pads
        self._borrowed = False  # the buffers are somebody else's tensors
        self.history = History()
        # What was last shown of each buffer, and of how many tokens: every step asks several times.
        self._keys_view: tuple[Tensor, int, Tensor] | None = None
        self._values_view: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def wrap(
        cls, keys: Keys, values: Values | None = None, kv_start: PerRow | None = None, kv_len: PerRow | None = None
    ) -> "DeviceStore":
        """A store over tensors that already exist; row i holds tokens kv_start[i] .. kv_len[i].

        Nothing is copied, and nothing written to the tensors: the first append moves to buffers of the store's own.
        """
        store = cls()
        store._borrow(keys, values, kv_start, kv_len)
        return store

    def _borrow(
        self, keys: Keys, values: Values | None, kv_start: PerRow | None = None, kv_len: PerRow | None = None
    ) -> None:
        check_keys_values(keys, values)
        keys, values = keys.resolve_neg(), None if values is None else values.resolve_neg()  # kernels read memory
        self._keys, self._values, self._len = keys, values, keys.shape[2]
        self._kv_start = _per_row(0 if kv_start is None else kv_start, keys)
        self._kv_len = _per_row(keys.shape[2] if kv_len is None else kv_len, keys)
        self._borrowed = True
        _check_rows(self._kv_start, self._kv_len, keys.shape[2])
        self._ragged = bool((self._kv_len != keys.shape[2]).any())

    def adopt(self, keys: Keys, values: Values | None, kv_start: PerRow) -> None:
        """Start with the tokens given, row i from kv_start[i] on. Only for a store that is empty."""
        self.append(keys, values)
        self.settle()
        self.kv_start = kv_start

    @property
    def place(self) -> Place:
        """Where the keys and values take up memory: on the GPU, in the host's RAM or in a file."""
        return "gpu" if self._keys is not None and self._keys.is_cuda else "host"

    @property
    def is_empty(self) -> bool:
        """True until the first append (and after ``clear``): there are no rows yet, and every view is empty."""
        return self._keys is None

    @property
    def keys(self) -> Keys:
        """A view [batch, num_kv_heads, kv_len, head_dim] of the keys held."""
        if self._keys is None:
            return _NOTHING
        self._keys_view = self._view(self._keys, self._keys_view)
        return self._keys_view[2]

    @property
    def values(self) -> Values | None:
        """A view [batch, num_kv_heads, kv_len, head_dim] of the values held, None if there are none."""
        if self._values is None:
            return None
        self._values_view = self._view(self._values, self._values_view)
        return self._values_view[2]

    def _view(self, buffer: Tensor, known: tuple[Tensor, int, Tensor] | None) -> tuple[Tensor, int, Tensor]:
        """The buffer, the tokens held and a view of them: what is known, if that is still so.

        A view of a tensor that asks for gradients tracks them or not, as the mode was when it was made: made anew each time.
        """
        if known is None or known[0] is not buffer or known[1] != self._len or buffer.requires_grad:
            return buffer, self._len, buffer.narrow(2, 0, self._len)
        return known

    @property
    def kv_start(self) -> PerRow:
        """Padding tokens at the left of each row, int32 [batch]."""
        return _NO_ROWS if self._kv_start is None else self._kv_start

    @kv_start.setter
    def kv_start(self, kv_start: PerRow) -> None:
        self._kv_start = _per_row(kv_start, self.keys)

    @property
    def has_padding(self) -> bool:
        """Whether some position of the views belongs to no row. Asks the device once, not at every step."""
        start, known = self.kv_start, self._padding_known
        if known is None or known[0] is not start or known[1] != version(start):
            known = self._padding_known = (start, version(start), bool(start.any()))
        return known[2] or self._ragged

    @property
    def kv_len(self) -> PerRow:
        """The end of each row, int32 [batch]."""
        return _NO_ROWS if self._kv_len is None else self._kv_len

    def __len__(self) -> int:
        """Tokens held by the longest row, padding included: the length of the views."""
        return self._len

    @property
    def capacity(self) -> int:
        """Tokens per row the buffers hold before they grow."""
        return 0 if self._keys is None else self._keys.shape[2]

    def capacity_for(self, kv_len: int) -> int:
        """Tokens per row the buffers will hold once an ``append`` has made the longest row kv_len tokens long."""
        if self._keys is None:
            # Room for a quarter more from the start, or the first decode step would copy the whole prompt.
            return self.reserve_tokens if self.reserve_tokens >= max(1, kv_len) else _grown(kv_len)
        if kv_len > self.capacity or self._borrowed:
            return max(_rounded(kv_len), _grown(self.capacity))
        return self.capacity

    def append(self, keys: Tensor, values: Tensor | None) -> None:
        """Add tokens [batch, num_kv_heads, new_len, head_dim] at the end of every row.

        Raises:
            ShapeError: the tokens do not fit what the store already holds, or its rows end at different positions.
        """
        check_keys_values(keys, values)
        keys, values = keys.resolve_neg(), None if values is None else values.resolve_neg()  # kernels read memory
        new_len = keys.shape[2]
        if self._keys is None:
            capacity = self.capacity_for(new_len)
            self._keys = self._buffer(keys, capacity)
            self._values = None if values is None else self._buffer(values, capacity)
            self._kv_start = _per_row(0, keys)
            self._padding_known = (self._kv_start, version(self._kv_start), False)
        self._check_fits(keys, values)
        end = self._len + new_len
        if end > self.capacity or self._borrowed:
            self._resize(self.capacity_for(end))
        self._write(keys, values, end)
        self._len = end
        self._kv_len = _per_row(end, self._keys)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the room to grow behind them, for whoever writes tokens there itself and then calls ``advance``.

        Replays know these, and ``kv_start``, as objects: memory that moves is a new tensor, never ``set_`` or ``resize_`` of the old one.
        """
        assert self._keys is not None and self._values is not None and not self._borrowed, "buffers of the store's own"
        return self._keys, self._values

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values with whatever room is behind them, to be read only."""
        assert self._keys is not None and self._values is not None, "values are held"
        return self._keys, self._values

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The keys and the values with the room behind them, ``kv_start`` and ``kv_len`` of a store that holds all of them."""
        keys, values, start, end = self._keys, self._values, self._kv_start, self._kv_len
        assert keys is not None and values is not None and start is not None and end is not None
        return keys, values, start, end

    def takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether one token a row like these can be written into ``buffers`` as they are, for ``advance`` to take in."""
        held, room = self._keys, self._values
        return (
            type(self) is DeviceStore  # the others move tokens elsewhere as they come
            and held is not None
            and room is not None
            and not (self._borrowed or self._ragged)
            and self._len < held.shape[2]
            and keys.shape == values.shape == (held.shape[0], held.shape[1], 1, held.shape[3])
            and keys.dtype == values.dtype == held.dtype == room.dtype
            and keys.device == values.device == held.device
        )

    def advance(self, kv_len: PerRow) -> None:
        """Take in one token a row that was written into the buffers already; kv_len, on the device, counts it."""
        assert self._len < self.capacity and not self._ragged
        self._len += 1
        self._kv_len = kv_len

    def _write(self, keys: Tensor, values: Tensor | None, end: int) -> None:
        """Put the new tokens into the buffers, up to position end."""
        assert self._keys is not None
        self._keys[:, :, self._len : end].copy_(keys)
        if values is not None:
            assert self._values is not None
            self._values[:, :, self._len : end].copy_(values)

    def settle(self) -> None:
        """Say that the prompt just appended has been attended and indexed. Here that changes nothing."""

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on; a longer kv_len than the store holds changes nothing."""
        if kv_len < 0:
            raise ShapeError(f"cannot truncate to kv_len={kv_len}; wanted a length of 0 or more tokens")
        if self._kv_len is not None and kv_len < self._len:
            self.history = self.history.cut(kv_len)
            self._len = kv_len
            self._kv_len = self._kv_len.clamp(max=kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        if self._keys is None:
            return
        self.history = self.history.cut(0)
        ids = ids.to(self._keys.device)
        self._resize(self.capacity, ids)
        self._kv_start, self._kv_len = self.kv_start[ids], self.kv_len[ids]

    def clear(self) -> None:
        """Give the buffers back; the next append decides shapes anew."""
        self._keys = self._values = self._kv_start = self._kv_len = self._keys_view = self._values_view = None
        self._len, self._ragged = 0, False
        self.history = self.history.cut(0)

    def memory_bytes(self) -> int:
        """Bytes allocated, room for growth included."""
        return sum(x.numel() * x.element_size() for x in (self._keys, self._values) if x is not None)

    def _resize(self, capacity: int, ids: Tensor | None = None) -> None:
        """Move the tokens held (of the rows ids) to new buffers."""
        rows = torch.arange(self.keys.shape[0], device=self.keys.device) if ids is None else ids
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            if old is None:
                continue
            new = self._buffer(old, capacity, batch=len(rows))
            torch.index_select(old[:, :, : self._len], 0, rows, out=new[:, :, : self._len])
            setattr(self, name, new)
        self._keys_view = self._values_view = None  # they would keep the old buffers
        self._borrowed = False

    def _buffer(self, like: Tensor, capacity: int, batch: int | None = None) -> Tensor:
        """An uninitialised buffer for capacity tokens of rows like the given ones."""
        # A buffer made inside inference_mode could not be written to outside of it; an ordinary one can be, in both.
        with torch.inference_mode(False):
            shape = (like.shape[0] if batch is None else batch, like.shape[1], capacity, like.shape[3])
            return self._allocate(shape, like.dtype, like.device)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(shape, dtype, device)

    def __getstate__(self) -> dict[str, Any]:
        # In a pickle a view has memory of its own: it would go on showing what was there.
        return self.__dict__ | {"_keys_view": None, "_values_view": None, "_padding_known": None}

    def __deepcopy__(self, memo: dict) -> "DeviceStore":
        twin = copy.copy(self)
        if self._keys is not None:
            twin._resize(self.capacity)
            twin._kv_start, twin._kv_len = self.kv_start.clone(), self.kv_len.clone()
        memo[id(self)] = twin
        return twin

    def _check_fits(self, keys: Tensor, values: Tensor | None) -> None:
        held = self.keys
        if self._ragged:
            raise ShapeError("cannot append to rows of different lengths; pad them on the left instead")
        want, got = (held.shape[:2], held.shape[3]), (keys.shape[:2], keys.shape[3])
        if want != got or keys.dtype != held.dtype or keys.device != held.device:
            raise ShapeError(
                f"cannot append keys {tuple(keys.shape)} {keys.dtype} on {keys.device} to a store of "
                f"[{held.shape[0]}, {held.shape[1]}, kv_len, {held.shape[3]}] {held.dtype} on {held.device}"
            )
        if (values is None) != (self._values is None):
            raise ShapeError("a store holds values for all of its tokens or for none of them")


def _check_rows(kv_start: Tensor, kv_len: Tensor, longest: int) -> None:
    if not ((kv_start >= 0) & (kv_start <= kv_len) & (kv_len <= longest)).all():
        raise ShapeError(
            f"kv_start={kv_start.tolist()} and kv_len={kv_len.tolist()}; wanted 0 <= kv_start <= kv_len <= {longest} in every row"
        )


def _rounded(tokens: int) -> int:
    return max(1, -(-tokens // _ROUND_TOKENS)) * _ROUND_TOKENS


def _grown(tokens: int) -> int:
    return _rounded(tokens + tokens // 4)


def version(x: Tensor) -> int:
    """Changes whenever x is written to; tensors of inference mode don't count."""
    return 0 if x.is_inference() else x._version


def _per_row(value: Tensor | int, like: Tensor) -> Tensor:
    """A contiguous int32 [batch] tensor on like's device."""
    batch = like.shape[0]
    if isinstance(value, int):
        return torch.full((batch,), value, dtype=torch.int32, device=like.device)
    if value.shape != (batch,):
        raise ShapeError(f"a per-row length has shape {tuple(value.shape)}; wanted [batch] = ({batch},)")
    return value.to(device=like.device, dtype=torch.int32).contiguous()
