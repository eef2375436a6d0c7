"""What launchers share: strides of a cache, constants on a device, and buffers kept from step to step."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from louver.sketch.layout import SCALES

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


@lru_cache(maxsize=64)
def workspace(device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer of this shape, allocated once. Steps of one stream share it; its content means nothing between steps."""
    return torch.empty(shape, dtype=dtype, device=device)


def buffers(make: Callable[..., Any], device: torch.device, *shape: Any) -> Any:
    """What ``make``, a function with an lru_cache, has for a shape; made anew, and the graph's own, where a graph is captured.

    A graph replays addresses: buffers that a cache may give back, or lend to another stream, must not be among them.
    """
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (make.__wrapped__ if captured else make)(device, *shape)  # pyright: ignore[reportFunctionMemberAccess]


def num_splits(rows: int, most: int, per_multiprocessor: int) -> int:
    """A power of two: enough programs to fill the device a few times over, no more than there is work for."""
    wanted = max(1, NUM_MULTIPROCESSORS * per_multiprocessor // rows)
    return 1 << (min(wanted, max(1, most), 256).bit_length() - 1)
