"""Matrix products in true float32, whatever the caller's settings: the proofs count float32 roundings.

``torch.autocast`` would hand a product to 16-bit kernels, and ``torch.set_float32_matmul_precision`` to TF32 or bfloat16; both are
a thousand times coarser than the slack in geometry/rounding.py allows, and both are common in code around a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor

_PRECISION_SETTINGS = attrgetter("backends.cuda.matmul", "backends.mkldnn.matmul")


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Switch off autocast and reduced-precision products on a device, and put them back afterwards."""
    with torch.autocast(device.type, enabled=False), _ieee_products():
        yield


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in true float32; both are float32."""
    with true_float32(a.device):
        return a @ b


@contextmanager
def _ieee_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = _PRECISION_SETTINGS(torch)
    saved = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, precision in zip(settings, saved, strict=True):
            s.fp32_precision = precision
