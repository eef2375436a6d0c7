"""Exact keys and values in memory-mapped files, for caches larger than RAM.

The operating system keeps in RAM what is used and may drop it at any time, because the files hold it; the process's own memory
stays small. A step reads single keys, but a disk gives pages of 4 KiB: 16 keys of 128 channels in 16 bits. So what comes from the disk is more than what the step
asks for, by up to that factor where the keys it asks for lie apart.

The files are working space, as nameless as the buffers they stand in for: nothing is left of them when the process ends, however
it ends. ``LouverCache.save`` writes the file to keep.
"""

import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from louver.errors import OutOfRoomError, ShapeError
from louver.kv.device import DeviceStore, Place
from louver.shapes import Keys, PerRow, Values


class DiskStore(DeviceStore):
    """A KVStore in memory-mapped files, for models on a CPU.

    Args:
        path: the folder of the working files, made where needed. On a disk: a folder in memory gains nothing.
        reserve_tokens: allocate this many tokens at once (speed only, never results).

    Raises:
        OutOfRoomError: the folder cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], *, reserve_tokens: int = 0) -> None:
        super().__init__(reserve_tokens=reserve_tokens)
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise OutOfRoomError(f"path={str(path)!r} cannot hold working files ({error.strerror})") from None

    def adopt(self, keys: Keys, values: Values | None, kv_start: PerRow) -> None:
        """Start with tensors that are mapped from a file already, without a copy. The first append moves to working files."""
        self._borrow(keys, values, kv_start)

    @property
    def place(self) -> Place:
        """Always ``"disk"``."""
        return "disk"

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            raise ShapeError(
                f"store='disk' takes keys and values on the CPU, got {device}: a GPU cannot read a mapped file; "
                "use store='host'"
            )
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return super()._allocate(shape, dtype, device)
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                _reserve(file.fileno(), num_bytes)
                mapped = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            raise OutOfRoomError(
                f"no room for {num_bytes / 2**20:,.0f} MiB of cache in {self.path} ({error.strerror})"
            ) from None
        return torch.frombuffer(mapped, dtype=dtype).view(shape)


def _reserve(handle: int, num_bytes: int) -> None:
    # A file that only claims its size would kill the process (SIGBUS) when the disk turns out to be full.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, num_bytes)
    else:
        os.truncate(handle, num_bytes)
