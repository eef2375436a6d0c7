"""The kernels of a step in CUDA C++ (*.cu), for the shapes they were written for; their twins in Triton serve the others.

Why not Triton alone: its compiler takes unpacked codes through shared memory into the layout of a matrix operand, its pipeliner leaves
one block of loads in flight, and it has no histogram in shared memory (docs/kernels.md). Here codes go from memory to the tensor core
in registers, several tiles ahead.
"""

from collections.abc import Callable
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from louver.geometry.rounded_query import quantized_query_slack
from louver.kernels.triton import runtime
from louver.kernels.triton.launch import NUM_MULTIPROCESSORS
from louver.kernels.triton.plan import MOST_KEYS, Plan
from louver.sketch.layout import Sketch

SLICES = {64: 1, 128: 2, 256: 4}  # head dimension -> radii per key
CTAS_PER_MULTIPROCESSOR = 2
LIST_CTAS_PER_MULTIPROCESSOR = 8
SCORE_CTAS_PER_MULTIPROCESSOR = 3
NUM_BINS = 1024  # of the histogram kept per query head (BINS in common.cuh)
NUM_LEVELS = 256  # the same of a retrieval
WARM_ELEMENTS = 1 << 28  # of keys, up to which list.cu and score.cu ask for what comes next: beyond, it costs more
METRICS = {"identity": 2, "frame": 1, "diagonal": 0}
QUERIES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def num_ctas(rows: int, most: int) -> int:
    """CTAs per KV head that fill the device once, no more than there is work for, and than finish.cu merges."""
    return max(1, min(most, NUM_MULTIPROCESSORS * CTAS_PER_MULTIPROCESSOR // rows, 256))


def _kernel(file: str, name: str, plan: Plan, *includes: str, **more: int) -> c_void_p:
    sketch = plan.sketch
    macros = (
        ("D", sketch.dims),
        ("G", plan.group),
        ("L", sketch.config.frame_len),
        ("S", sketch.num_slices),
        ("DROP", int(plan.rule.drop)),
        ("FIXED", int(plan.fixed)),
        *more.items(),
    )
    return runtime.function((*includes, file), name, macros)


def _choice(plan: Plan) -> tuple[c_longlong, c_longlong, c_int]:
    share, tolerance, need, *_ = plan.choice
    return c_longlong(share), c_longlong(tolerance), c_int(need)


def _scan_warps(plan: Plan, ctas: int) -> int:
    """Warps of a CTA of scan.cu: more where one block each then does for a KV head."""
    if plan.group > 4:
        return 8 if plan.sketch.dims == 128 or (plan.sketch.dims == 64 and plan.rule.drop) else 4
    return 12 if 8 * ctas < plan.sketch.capacity <= 12 * ctas and plan.sketch.dims <= 128 else 8


def _tiers_warps(plan: Plan, ctas: int) -> int:
    """Warps of a CTA of tiers.cu, likewise."""
    if plan.group * plan.sketch.dims > 1024:
        return 4
    return 10 if 8 * ctas < plan.sketch.capacity <= 10 * ctas and plan.sketch.dims <= 128 else 8


def _scan_memory(plan: Plan, warps: int, ahead: int) -> int:
    """Bytes of shared memory of a CTA of scan.cu (struct Shared)."""
    dims, group, length, slices = plan.sketch.dims, plan.group, plan.sketch.config.frame_len, plan.sketch.num_slices
    fixed = 1024 + -(-group // 4) * dims * 32 + group * 4 * (NUM_LEVELS if plan.rule.drop else NUM_BINS)
    staged = group * (length + 16 if plan.rule.drop else 2 * length + 16)
    frames = 2 * (2 * dims + length // 2 * slices + 32) + 8 * dims + 128
    return fixed + warps * (staged + frames + ahead * 8 * dims)


@lru_cache(maxsize=8)
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _deepest(plan: Plan, depths: tuple[int, ...], memory: Callable[[Plan, int, int], int], warps: int) -> int:
    """The deepest of some queues with which the CTAs of a multiprocessor find room, or 2."""
    most = _shared_memory(plan.keys.get_device()) // CTAS_PER_MULTIPROCESSOR - 1024
    tiles = plan.sketch.config.frame_len // 16
    return next((n for n in depths if n <= tiles and memory(plan, warps, n) <= most), 2)


def prepare(plan: Plan, x: Tensor, floor: tuple[float, float], ranked: bool) -> None:
    """Place the grids, and clear what the other kernels count into.

    ``floor``: share of the centers above which bounds are counted, and by how many nats below it.
    """
    w, sketch = plan.workspace, plan.sketch
    runtime.launch(
        _kernel("prepare.cu", "prepare", plan, Q=QUERIES[x.dtype], RANKS=int(ranked)),
        (plan.rows * plan.group, 1),
        128,
        [
            x, sketch.key_frame, sketch.key_scale, sketch.num_blocks, w.low, w.floor, w.query, w.hist, w.rank_hist, w.counters, w.masses, w.below,
            *map(c_int, (plan.num_kv_heads, sketch.capacity)), *map(c_float, (plan.scale, *floor, plan.choice[3])),
        ],
    )  # fmt: skip


def scan(plan: Plan, x: Tensor, sinks: int, recent: int) -> None:
    """Leave upper bounds and reach of every closed key, and histograms of the bounds, in the workspace."""
    w, sketch = plan.workspace, plan.sketch
    most = max(1, NUM_MULTIPROCESSORS * CTAS_PER_MULTIPROCESSOR // plan.rows)
    warps = _scan_warps(plan, most)
    splits = max(1, min(-(-sketch.capacity // warps), most))
    ahead = _deepest(plan, (8, 4), _scan_memory, warps)
    # No third CTA on a multiprocessor: the grid is two each, and a third would be another's second.
    for_two = _shared_memory(plan.keys.get_device()) // (CTAS_PER_MULTIPROCESSOR + 1)
    memory = max(_scan_memory(plan, warps, ahead), for_two)
    slack = quantized_query_slack(sketch.dims)
    sinks, recent = min(sinks, MOST_KEYS), min(recent, MOST_KEYS)
    runtime.launch(
        _kernel(
            "scan.cu", "scan", plan, "scan.cuh", FRAME=METRICS[sketch.config.metric], Q=QUERIES[x.dtype], WARPS=warps, AHEAD=ahead,
        ),
        (plan.rows, splits),
        warps * 32,
        [
            x, sketch.key_codes, sketch.key_frame, sketch.key_scale, sketch.key_radius, sketch.radius_least, sketch.radius_unit,
            plan.scales, sketch.query_weight, *plan.place, w.low, w.floor, w.upper, w.reach, w.hist, w.masses,
            *map(c_int, (plan.num_kv_heads, sketch.capacity, sinks, recent)), *map(c_float, (plan.scale, *slack, plan.rounding[3])),
        ],
        shared_bytes=memory,
        early=True,
    )  # fmt: skip


def _exact_cache(plan: Plan) -> list[Tensor | c_longlong | c_int]:
    """Keys and values as kernels take them: pointers, the table of pages, strides, tokens of a page."""
    keys, values, table = plan.keys, plan.values, plan.block_table
    strides = (*keys.stride()[:3], *values.stride()[:3], 0 if table is None else table.stride(0))
    return [keys, values, keys if table is None else table, *map(c_longlong, strides), c_int(keys.shape[2])]


def _cache(plan: Plan) -> dict[str, int]:
    return {"BF16": int(plan.keys.dtype == torch.bfloat16), "PAGED": int(plan.block_table is not None)}


def _warm(plan: Plan) -> int:
    """What of a listed key list.cu asks for into the L2: 1 its key, 3 its value too, 0 nothing (a cache too long, or behind the bus)."""
    elements = plan.rows * plan.sketch.capacity * plan.sketch.config.frame_len * plan.sketch.dims
    if elements > WARM_ELEMENTS or not serves_cache(plan.keys, plan.values) or runtime.in_host_memory(plan.keys):
        return 0
    return 3 if plan.fixed else 1


def list_keys(plan: Plan, keep_best: bool) -> None:
    """Make this step's cuts, and list what reaches them."""
    w, sketch = plan.workspace, plan.sketch
    steps = -(-sketch.capacity * sketch.config.frame_len // 2048)
    turns = max(1, min(4, -(-steps * plan.rows // (LIST_CTAS_PER_MULTIPROCESSOR * NUM_MULTIPROCESSORS))))
    splits = max(1, -(-steps // turns))
    runtime.launch(
        _kernel(
            "list.cu", "list_keys", plan, "cache.cuh", TURNS=turns, KEEP_BEST=int(keep_best), WARM=_warm(plan), **_cache(plan),
        ),
        (plan.rows, splits),
        128,
        [
            w.upper, sketch.value_spread, *plan.place, w.hist, w.floor, w.low, w.cuts, w.tau, w.listed, w.counters, w.below,
            *_exact_cache(plan), *map(c_int, (plan.num_kv_heads, sketch.capacity, plan.room)), c_float(plan.scale), *_choice(plan), c_float(plan.choice[3]),
        ],
        early=True,
    )  # fmt: skip


def _tiers_memory(plan: Plan, warps: int, ahead: int) -> int:
    """Bytes of shared memory of a CTA of tiers.cu (struct Shared)."""
    dims, group, length, slices = plan.sketch.dims, plan.group, plan.sketch.config.frame_len, plan.sketch.num_slices
    block = group * (2 * length + 32) + length // 2 * slices + 2 * dims + -(-(slices + 2) * group * 4 // 16) * 16 + 16
    out = 4 * group * max(warps * (dims + 36), NUM_BINS + 32)  # before, the histograms
    return 1024 + out + 12 * group + 16 + warps * (28 * group + 3 * block + ahead * 8 * dims)


def tiers(plan: Plan, splits: int) -> None:
    """Make this step's cuts, list the exact keys and attend the others through the sketch."""
    w, sketch = plan.workspace, plan.sketch
    frames = sketch.value_frames
    assert frames is not None, "a policy that drops nothing needs sketched values"
    warps = _tiers_warps(plan, splits)
    ahead = _deepest(plan, (4,), _tiers_memory, warps)
    runtime.launch(
        _kernel("tiers.cu", "tiers", plan, "cuts.cuh", WARPS=warps, AHEAD=ahead),
        (plan.rows, splits),
        warps * 32,
        [
            w.upper, w.reach, sketch.key_radius, frames.codes, frames.frame, frames.scale, frames.error,
            sketch.value_spread, plan.scales, sketch.num_blocks, w.low, w.hist, w.floor, w.masses, *plan.place[1:], w.cuts, w.tau, w.listed,
            w.counters, w.tier_out, w.tier_sums, *map(c_int, (plan.num_kv_heads, sketch.capacity, plan.room)), c_float(plan.scale),
            *_choice(plan), c_float(plan.choice[4]),
        ],
        shared_bytes=_tiers_memory(plan, warps, ahead),
        early=True,
    )  # fmt: skip


def serves_cache(keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values can be read 16 bytes at a time."""
    return all(
        x.dtype in (torch.float16, torch.bfloat16)
        and x.stride(3) == 1
        and all(s % 8 == 0 for s in x.stride()[:3])
        and x.data_ptr() % 16 == 0
        for x in (keys, values)
    )


def score(plan: Plan, slack_share: float) -> None:
    """Score the list and the open block, and count the scores. ``slack_share``: of |q| |k|, what a score may be off by."""
    w = plan.workspace
    splits = max(
        1, min(-(-w.list_scores.shape[1] // 16), SCORE_CTAS_PER_MULTIPROCESSOR * NUM_MULTIPROCESSORS // plan.rows)
    )
    runtime.launch(
        _kernel("score.cu", "score", plan, "cache.cuh", WARM=_warm(plan), **_cache(plan)),
        (plan.rows, splits),
        256,
        [
            w.query, *_exact_cache(plan), *plan.place, w.low, w.cuts, w.listed, w.counters, w.list_scores, w.list_slacks, w.rank_hist,
            *map(c_int, (plan.num_kv_heads, plan.room)), *map(c_float, (plan.scale, slack_share)),
        ],
        early=True,
    )  # fmt: skip


def attend(plan: Plan, splits: int, slack_share: float, mask: Tensor | None) -> None:
    """Raise tau to the rank-th best score, and attend what reaches it exactly."""
    w = plan.workspace
    runtime.launch(
        _kernel("attend.cu", "attend", plan, "cache.cuh", **_cache(plan)),
        (plan.rows, splits),
        256,
        [
            w.query, *_exact_cache(plan), *plan.place, w.low, w.cuts, w.tau, w.raised, w.rank_hist, w.listed, w.list_scores, w.list_slacks,
            w.counters, w.exact_out, w.exact_sums, c_void_p(0) if mask is None else mask,
            c_longlong(0 if mask is None else mask.stride(1)), *map(c_int, (plan.num_kv_heads, plan.room)),
            *map(c_float, (plan.scale, slack_share, 2.0**-20)), *_choice(plan),
        ],
        early=True,
    )  # fmt: skip


def finish(
    plan: Plan,
    splits: tuple[int, int],
    tau: Tensor,
    rounding: tuple[float, float],
    result: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Merge ``splits`` (exact, tiers) into output, evidence and counts. ``rounding``: of the sums, and the output's unit."""
    w = plan.workspace
    runtime.launch(
        _kernel("finish.cu", "finish", plan, OUT=QUERIES[result[0].dtype]),
        (plan.rows * plan.group, 1),
        256,
        [
            w.exact_out, w.exact_sums, w.tier_out, w.tier_sums, w.low, w.cuts, tau, w.below, plan.sketch.value_mean, w.counters,
            *plan.place, *result, *map(c_int, (plan.num_kv_heads, plan.room, *splits)), *map(c_float, rounding),
        ],
        early=True,
    )  # fmt: skip
