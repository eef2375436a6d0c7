"""What launchers share: strides of a cache, constants on a device, and buffers kept from step to step."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from louver.kernels.triton import runtime
from louver.sketch.layout import SCALES

MOST_BYTES = 256 << 20  # of buffers held from step to step, beside the largest
ROUNDED_TOKENS = 1024
NUM_MULTIPROCESSORS = 132  # of a Hopper card; only the number of programs depends on it


@lru_cache(maxsize=16)
def scales_on(device: torch.device) -> Tensor:
    """The table of frame scales, float32 [256]."""
    return SCALES.to(device)


def cache_arguments(keys: Tensor, values: Tensor, block_table: Tensor | None) -> tuple:
    """Pointers and strides of keys and values, in pages or not, as every kernel takes them."""
    table = block_table if block_table is not None else keys
    table_stride = block_table.stride(0) if block_table is not None else 0
    return (keys, values, table, *keys.stride(), *values.stride(), table_stride, keys.shape[2])


def workspace(device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer of this shape, to be asked for through ``buffers``. ``name`` keeps those of one shape apart."""
    return torch.empty(shape, dtype=dtype, device=device)


_held: OrderedDict[tuple, Any] = OrderedDict()  # of steps before, the last used at the end
_held_by_one = threading.Lock()


def buffers(make: Callable[..., Any], device: torch.device, *shape: Any) -> Any:
    """What ``make(device, *shape)``, a tensor or a tuple of them, made once per shape; its content means nothing between steps.

    Steps of one thread and stream share it. Those used last stay, up to MOST_BYTES beside the largest. Where a graph is captured it is made anew, and the graph's
    own: a graph replays addresses, and buffers that are given back, or lent to another stream, must not be among them.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(device, *shape)
    stream = runtime.current_stream() if device.type == "cuda" else 0
    key = (make, device, shape, stream, threading.get_ident())
    with _held_by_one:
        made = _held.get(key)
        if made is None:
            made = _held[key] = make(device, *shape)
            while sum(sizes := [_num_bytes(x) for x in _held.values()]) > MOST_BYTES + max(sizes):
                _held.popitem(last=False)
        _held.move_to_end(key)
        return made


def _num_bytes(made: Tensor | tuple[Tensor, ...]) -> int:
    return made.nbytes if isinstance(made, Tensor) else sum(x.nbytes for x in made)


def rounded(tokens: int) -> int:
    """Up to how many tokens all that the host decides by length stays the same: a power of two, from 1,024 on a multiple of that.

    While a cache grows up to it, every step makes the same launches, which a step captured in a graph repeats.
    """
    return (
        1 << max(tokens - 1, 0).bit_length()
        if tokens < ROUNDED_TOKENS
        else -(-tokens // ROUNDED_TOKENS) * ROUNDED_TOKENS
    )


def longest_row(keys: Tensor, block_table: Tensor | None = None) -> int:
    """Tokens that a row may have, rounded, for whatever the host decides by length."""
    return rounded(keys.shape[2] * (1 if block_table is None else block_table.shape[1]))


def early_options(x: Tensor) -> dict[str, bool]:
    """Options of a Triton kernel that begins with take_turn(), so that it may start while its predecessor ends where a card can do that."""
    early = x.is_cuda and runtime.starts_early(x.get_device())
    return {"OVERLAPS": early, **({"launch_pdl": True} if early else {})}


def num_splits(rows: int, most: int, per_multiprocessor: int) -> int:
    """A power of two: enough programs to fill the device a few times over, no more than there is work for."""
    wanted = max(1, NUM_MULTIPROCESSORS * per_multiprocessor // rows)
    return 1 << (min(wanted, max(1, most), 256).bit_length() - 1)
