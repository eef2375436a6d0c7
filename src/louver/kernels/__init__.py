"""Dispatch: a backend is a module of ops with the same names and signatures, chosen once and out loud.

``"auto"`` resolves to the fastest backend that serves the device; a backend named but missing is an error, never a fallback.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from louver.errors import BackendError
from louver.kernels.cpu import native

OPS = (
    "encode_block",
    "bounds",
    "tighten",
    "settle",
    "count_tiers",
    "resolve",
    "search",
    "score",
    "attend_selection",
    "attend_tiers",
    "attend_dense",
    "merge",
    "step",
    "sum_reaches",
    "all_reach",
)
_MODULES = {"reference": "louver.kernels.reference", "cpu": "louver.kernels.cpu", "triton": "louver.kernels.triton"}


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that work on this machine for tensors on device, the fastest first."""
    if torch.device(device).type == "cpu" and native.available():
        return ["cpu", "reference"]
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None:
        return ["triton", "reference"]
    return ["reference"]


def resolve_backend(name: str, device: torch.device | str | None = None) -> str:
    """The backend a name stands for on a device; "auto" is the fastest available.

    Without a device, before there are tensors, a named backend is looked for where it runs, and "auto" on the CPU.

    Raises:
        BackendError: the name is unknown, or the backend is not available here.
    """
    device = device or ("cuda" if name == "triton" else "cpu")
    available = available_backends(device)
    if name == "auto":
        return available[0]
    if name == "cpu" and not native.available():
        raise BackendError(f"backend='cpu' was not compiled here ({native.reason}); {native.HOW_TO_BUILD}")
    if name not in available:
        raise BackendError(f"backend={name!r} is not available for {device}; available here: {', '.join(available)}")
    return name


@cache  # asked at every step
def get_ops(name: str) -> ModuleType:
    """The module that holds a resolved backend's ops."""
    return importlib.import_module(_MODULES[name])
