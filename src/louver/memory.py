"""Buffers for what a decode step walks through. On pages of 4 KB a step over 131,072 keys waits a tenth of its time for addresses."""

import ctypes
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 8 << 20  # smaller buffers would be rounded up to too much of a 2 MB page

_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; of a large buffer on a CPU the system is asked for huge pages. Speed only: it may say no."""
    x = torch.empty(shape, dtype=dtype, device=device)
    num_bytes = x.numel() * x.element_size()
    if _HUGE is not None and x.device.type == "cpu" and num_bytes >= LEAST_BYTES:
        begin = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (x.data_ptr() + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _HUGE)
    return x
