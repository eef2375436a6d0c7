"""The kernels of a step in CUDA C++ (*.cu), for the shapes they were written for; their twins in Triton serve the others.

Why not Triton alone: its compiler takes unpacked codes through shared memory into the layout of a matrix operand, its pipeliner leaves
one block of loads in flight, and it has no histogram in shared memory (docs/kernels.md). Here codes go from memory to the tensor core
in registers, several tiles ahead.
"""

from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from louver.kernels.triton import runtime
from louver.kernels.triton.launch import NUM_MULTIPROCESSORS, num_splits
from louver.sketch.layout import Sketch

if TYPE_CHECKING:
    from louver.kernels.triton.step import Plan

SLICES = {64: 1, 128: 2, 256: 4}  # head dimension -> radii per key
CTAS_PER_MULTIPROCESSOR = 2
METRICS = {"identity": 2, "frame": 1, "diagonal": 0}


def serves_scan(q: Tensor, sketch: Sketch, group: int) -> bool:
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
    """Bins of the histogram kept per query head (BINS in common.cuh)."""
    return 1024 if group <= 4 else 512


def num_tiers(rows: int, capacity: int) -> int:
    """CTAs per KV head of tiers.cu; finish_kernel wants a power of two."""
    return num_splits(rows, -(-capacity // 8), CTAS_PER_MULTIPROCESSOR)


def _kernel(file: str, name: str, plan: "Plan", **more: int) -> c_void_p:
    sketch = plan.sketch
    macros = {
        "D": sketch.dims,
        "G": plan.group,
        "L": sketch.config.frame_len,
        "S": sketch.num_slices,
        "DROP": int(plan.rule.drop),
        "FIXED": int(plan.fixed),
        **more,
    }
    return runtime.function(file, name, tuple(f"-D{k}={v}" for k, v in macros.items()))


def _choice(plan: "Plan") -> tuple[c_longlong, c_longlong, c_int]:
    share, tolerance, need, *_ = plan.choice
    return c_longlong(share), c_longlong(tolerance), c_int(need)


def scan(plan: "Plan", sinks: int, recent: int, keep_best: bool) -> None:
    """Leave upper bounds and reach of every closed key, and this step's cuts, in the workspace."""
    w, sketch = plan.workspace, plan.sketch
    warps = 8 if plan.group <= 4 else 4
    splits = max(1, min(-(-sketch.capacity // warps), NUM_MULTIPROCESSORS * CTAS_PER_MULTIPROCESSOR // plan.rows))
    metric = METRICS[sketch.config.metric]
    *_, tau, unread_mass = plan.choice
    runtime.launch(
        _kernel("scan.cu", "scan", plan, FRAME=metric, KEEP_BEST=int(keep_best)),
        (plan.rows, splits),
        warps * 32,
        [
            w.query, sketch.key_codes, sketch.key_center, sketch.key_scale, sketch.key_radius, sketch.radius_unit,
            plan.scales, sketch.query_weight, *plan.place, w.low, w.floor, w.upper, w.reach, w.hist, w.masses, w.finished,
            w.cuts, w.tau, *map(c_int, (plan.num_kv_heads, sketch.capacity, sinks, recent)), c_float(plan.scale),
            *map(c_float, plan.rounding), *_choice(plan), c_float(tau), c_float(unread_mass),
        ],
    )  # fmt: skip


def list_keys(plan: "Plan") -> None:
    """List what reaches the cuts."""
    w, sketch = plan.workspace, plan.sketch
    per_step = 512 // sketch.config.frame_len
    steps = -(-sketch.capacity // per_step)
    steps_each = 4 if steps * plan.rows > 4 * NUM_MULTIPROCESSORS * 8 else 1
    splits = max(1, -(-steps // steps_each))
    runtime.launch(
        _kernel("list.cu", "list_keys", plan, STEPS_EACH=steps_each),
        (plan.rows, splits),
        256,
        [
            w.upper, sketch.value_spread, sketch.num_blocks, w.cuts, w.listed, w.counters, w.below,
            *map(c_int, (plan.num_kv_heads, sketch.capacity, plan.room)),
        ],
    )  # fmt: skip


def tiers(plan: "Plan", splits: int) -> None:
    """List the exact keys and attend the others through the sketch."""
    w, sketch = plan.workspace, plan.sketch
    frames = sketch.value_frames
    assert frames is not None, "a policy that drops nothing needs sketched values"
    runtime.launch(
        _kernel("tiers.cu", "tiers", plan),
        (plan.rows, splits),
        128 if plan.group * sketch.dims > 1024 else 256,
        [
            w.upper, w.reach, sketch.key_radius, frames.codes, frames.center, frames.scale, frames.error,
            sketch.value_spread, plan.scales, sketch.num_blocks, w.low, w.cuts, w.listed, w.counters, w.tier_out, w.tier_sums,
            *map(c_int, (plan.num_kv_heads, sketch.capacity, plan.room)),
        ],
    )  # fmt: skip


def serves_cache(keys: Tensor, values: Tensor) -> bool:
    """Whether attend.cu can read keys and values, four bytes at a time."""
    return all(
        x.dtype in (torch.float16, torch.bfloat16)
        and x.stride(3) == 1
        and all(s % 2 == 0 for s in x.stride()[:3])
        and x.data_ptr() % 4 == 0
        for x in (keys, values)
    )


def attend(plan: "Plan", splits: int, slack_share: float, mask: Tensor | None) -> None:
    """Exact attention over a scored list."""
    w, keys, values, table = plan.workspace, plan.keys, plan.values, plan.block_table
    runtime.launch(
        _kernel("attend.cu", "attend", plan, BF16=int(keys.dtype == torch.bfloat16), PAGED=int(table is not None)),
        (plan.rows, splits),
        256,
        [
            w.query, keys, values, keys if table is None else table,
            *map(c_longlong, (*keys.stride()[:3], *values.stride()[:3], 0 if table is None else table.stride(0))),
            c_int(keys.shape[2]), *plan.place, w.low, w.tau, w.listed, w.list_scores, w.list_slacks, w.counters,
            w.exact_out, w.exact_sums, c_void_p(0) if mask is None else mask, c_longlong(0 if mask is None else mask.stride(1)),
            *map(c_int, (plan.num_kv_heads, plan.room, w.list_scores.shape[1])),
            *map(c_float, (plan.scale, slack_share, 2.0**-20)),
        ],
    )  # fmt: skip
