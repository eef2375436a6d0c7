"""Page-locked host memory as a CUDA tensor: unified addressing gives host and GPU the same pointer to it."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from louver.errors import OutOfRoomError


def pinned_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that CUDA treats as its own and that lies in the host's RAM.

    torch's own pinned allocator rounds up to a power of two, which for a cache can mean twice the memory; this takes what
    it needs. The memory is freed with the last tensor over it.

    Raises:
        OutOfRoomError: the host cannot lock that many bytes.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    with torch.cuda.device(device):
        host = _Locked(max(1, num_bytes), device)
        return torch.as_tensor(host, device=device)[:num_bytes].view(dtype).view(shape)


class _Locked:
    """Locked memory, as other libraries ask for it: by ``__cuda_array_interface__``."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        status = _runtime().cudaHostRegister(self.memory.data_ptr(), num_bytes, 0)
        if int(status):
            raise OutOfRoomError(
                f"cannot lock {num_bytes / 2**30:.1f} GiB of host memory for the GPU to read (CUDA error {int(status)}): "
                "is there that much RAM, and does the limit on locked memory (ulimit -l) allow it?"
            )
        weakref.finalize(self, _unlock, self.memory, device)
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self.memory.data_ptr(), False),
            "version": 3,
        }


def _unlock(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a kernel may still be reading
    _runtime().cudaHostUnregister(memory.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()
