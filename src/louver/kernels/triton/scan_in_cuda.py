"""The scan in CUDA C++ (scan.cu), for the shapes it was written for; scan.py serves the others and cards without NVRTC.

Why not Triton: its compiler takes unpacked codes through shared memory into the layout of a matrix operand, and its pipeliner leaves one
block of loads in flight (docs/kernels.md). Here codes go from memory to the tensor core in registers, several tiles ahead.
"""

from ctypes import c_float, c_int, c_longlong
from typing import TYPE_CHECKING

from torch import Tensor

from louver.kernels.triton import runtime
from louver.kernels.triton.launch import NUM_MULTIPROCESSORS
from louver.sketch.layout import Sketch

if TYPE_CHECKING:
    from louver.kernels.triton.step import Workspace

SLICES = {64: 1, 128: 2, 256: 4}  # head dimension -> radii per key
CTAS_PER_MULTIPROCESSOR = 2


def serves(q: Tensor, sketch: Sketch, group: int) -> bool:
    """Whether scan.cu takes these shapes, on this device."""
    return (
        q.is_cuda
        and SLICES.get(q.shape[2]) == sketch.num_slices
        and sketch.dims == q.shape[2]
        and group <= 8
        and sketch.config.frame_len in (64, 128)
        and runtime.available()
    )


def num_bins(group: int) -> int:
    """Bins of the histogram kept per query head (BINS in scan.cu)."""
    return 1024 if group <= 4 else 512


def scan(
    w: "Workspace",
    sketch: Sketch,
    scales: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    ends: tuple[int, int, int, int, float],
    rounding: tuple[float, ...],
    choice: tuple[int, int, int, float, float],
    group: int,
    metric: int,
    drop: bool,
    fixed: bool,
    keep_best: bool,
) -> None:
    """Leave upper bounds and reach of every closed key, and this step's cuts, in the workspace."""
    warps = 8 if group <= 4 else 4
    rows = w.counters.shape[0]
    splits = max(1, min(-(-sketch.capacity // warps), NUM_MULTIPROCESSORS * CTAS_PER_MULTIPROCESSOR // rows))
    macros = {
        "D": sketch.dims,
        "G": group,
        "L": sketch.config.frame_len,
        "S": sketch.num_slices,
        "FRAME": metric,
        "DROP": int(drop),
        "FIXED": int(fixed),
        "KEEP_BEST": int(keep_best),
    }
    kernel = runtime.function("scan.cu", "scan", tuple(f"-D{k}={v}" for k, v in macros.items()))
    share, tolerance, need, tau, unread_mass = choice
    *integers, scale = ends
    runtime.launch(
        kernel,
        (rows, splits),
        warps * 32,
        [
            w.query, sketch.key_codes, sketch.key_center, sketch.key_scale, sketch.key_radius, sketch.radius_unit, scales,
            sketch.query_weight, *place, w.low, w.floor, w.upper, w.reach, w.hist, w.masses, w.finished, w.cuts, w.tau,
            *map(c_int, integers), c_float(scale), *map(c_float, rounding), c_longlong(share), c_longlong(tolerance),
            c_int(need), c_float(tau), c_float(unread_mass),
        ],
    )  # fmt: skip
