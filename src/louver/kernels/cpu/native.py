"""The compiled module, found once; and the native view of a sketch, kept as long as the sketch's tensors stay the same."""

import importlib
import os
from functools import cache
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]

from louver.sketch.layout import HANDLE, Sketch

try:
    _native: ModuleType | None = importlib.import_module("louver.kernels.cpu._native")
    reason = ""
except ImportError as error:  # a pure wheel: no compiler was found at install time
    _native, reason = None, str(error)

TENSORS = (
    "num_blocks",
    "query_weight",
    "key_codes",
    "key_frame",
    "key_scale",
    "key_radius",
    "radius_least",
    "radius_unit",
    "value_mean",
    "value_spread",
    "value_codes",
    "value_frame",
    "value_scale",
    "value_error",
    "pages",
)
_tensors_of = attrgetter(*TENSORS)
Cache = Float[Tensor, "rows num_kv_heads tokens head_dim"]  # a batch, or pages behind a block table
METRICS = {"frame": 0, "diagonal": 1, "identity": 2}
HOW_TO_BUILD = "reinstall louver where a C++17 compiler is found, or run `make native` in a checkout"

# The instruction set to use; empty means the best this machine has. For tests and measurements.
isa = os.environ.get("LOUVER_CPU_ISA", "")


def available() -> bool:
    """True where the extension was built."""
    return _native is not None


def load() -> Any:
    """The extension. Callers have resolved the backend, so it is there."""
    assert _native is not None, "the cpu backend was used without being available"
    return _native


def share(x: Tensor | None) -> Any:
    """A tensor as the extension takes it. A tensor would do, but its own ``__dlpack__`` takes eight times as long."""
    return None if x is None else to_dlpack(x.resolve_neg() if x.is_neg() else x)  # whose memory has the other sign


def sketch_view(sketch: Sketch) -> Any:
    """The native view of a sketch, made again when one of its tensors was replaced."""
    view = sketch.__dict__.get(HANDLE)
    if view is None:
        config, held = sketch.config, list(_tensors_of(sketch))
        view = load().Sketch(held, config.frame_len, sketch.head_dim, METRICS[config.metric], config.clip)
        sketch.__dict__[HANDLE] = view
    return view


def is_finite(x: Tensor) -> bool:
    """Whether no element of a contiguous tensor is NaN or infinite. Two ops of torch take ten times as long between steps of a model."""
    return load().is_finite(share(x.contiguous()))


def instruction_set() -> str:
    """The one in use: the best this machine has, unless LOUVER_CPU_ISA names another."""
    return isa or _best()


@cache  # asked at every step
def _best() -> str:
    return load().instruction_sets()[0]


def num_threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
