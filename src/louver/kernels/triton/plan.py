"""What the launches of one step have in common: its buffers, shapes and rule."""

from typing import NamedTuple

import torch
from torch import Tensor

from louver.geometry.rounded_query import rounded_query_slack
from louver.geometry.rounding import radius_inflation
from louver.kernels.triton.common import BINS, COUNTERS, RANK_BINS
from louver.kernels.triton.launch import buffers, scales_on
from louver.protocols import CutRule
from louver.shapes import Keys, PerRow, Query, Values
from louver.sketch.layout import Sketch

LONG = 1 << 18  # tokens
SHARE_BITS = 40
MOST_KEYS = 1 << 30  # that a row can hold: a listed token has so many bits; who asks for more asks for all
TOLERANCE = 1 << 20  # in 2^-40: forgives a share such as 0.01 its binary rounding


class Workspace(NamedTuple):
    """Buffers of a step, allocated once per shape and shared by the layers of a model: nothing lives on between steps."""

    low: Tensor  # per query head: where its grid begins, nats
    floor: Tensor
    query: Tensor
    masses: Tensor
    hist: Tensor
    rank_hist: Tensor
    counters: Tensor
    finished: Tensor
    cuts: Tensor
    tau: Tensor
    raised: Tensor  # tau, once a rank was found
    below: Tensor
    upper: Tensor  # per key and query head: its code, or in CUDA, of a retrieval, its level: half of this
    reach: Tensor
    listed: Tensor
    list_scores: Tensor
    list_slacks: Tensor
    exact_out: Tensor
    exact_sums: Tensor
    tier_out: Tensor
    tier_sums: Tensor


class Plan(NamedTuple):
    """What the launches of one step have in common."""

    workspace: Workspace
    sketch: Sketch
    rule: CutRule
    keys: Tensor
    values: Tensor
    block_table: Tensor | None
    place: tuple[Tensor, Tensor, Tensor]  # num_blocks, kv_start, kv_len
    scales: Tensor
    scale: float
    rows: int
    group: int
    num_kv_heads: int
    room: int
    choice: tuple[int, int, int, float, float]  # share, tolerance, need, tau, unread mass
    rounding: tuple[float, ...]
    fixed: bool


def workspace(
    device: torch.device,
    rows: int,
    group: int,
    dims: int,
    capacity: int,
    frame_len: int,
    slices: int,
    scans: int,
    exacts: int,
) -> Workspace:
    """Allocate the buffers for rows = batch * num_kv_heads."""
    heads, room = rows * group, room_for(capacity * frame_len)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Workspace(
        low=new(heads),
        floor=new(heads, dtype=torch.int32),
        query=new(heads, dims),
        masses=new(heads, 2),
        hist=new(heads, 2, BINS.value, dtype=torch.int32),
        rank_hist=new(heads, RANK_BINS.value, dtype=torch.int32),
        counters=new(rows, COUNTERS, dtype=torch.int32),
        finished=new(heads, dtype=torch.int32),
        cuts=new(heads, 2, dtype=torch.int32),
        tau=new(heads),
        raised=new(heads),
        below=new(heads),
        upper=new(rows, capacity, group, frame_len, dtype=torch.int16),
        reach=new(rows, capacity, slices + 2, group),
        listed=new(rows, room, dtype=torch.int32),
        list_scores=new(rows, room + 2 * frame_len, group),  # and of the open block
        list_slacks=new(rows, room + 2 * frame_len, group),
        exact_out=new(heads, exacts, dims),
        exact_sums=new(heads, exacts, 8),
        tier_out=new(heads, scans, dims),
        tier_sums=new(heads, scans, 8),
    )


def room_for(tokens: int) -> int:
    """Places in a KV head's list of exact keys: all of a cache's, half of a long one's (36 bytes each where 4 heads share a key)."""
    return min(tokens, max(LONG, tokens // 2))


def plan_for(
    q: Query,
    keys: Keys,
    values: Values,
    sketch: Sketch,
    rule: CutRule,
    ends: tuple[PerRow, PerRow],
    scale: float,
    block_table: Tensor | None,
    scans: int,
    exacts: int,
) -> Plan:
    """What the launches of a step over these tensors have in common; its parts are split among ``scans`` and ``exacts`` programs."""
    num_kv_heads, head_dim = keys.shape[1], q.shape[2]
    group, rows = q.shape[1] // num_kv_heads, q.shape[0] * num_kv_heads
    shape = (rows, group, head_dim, sketch.capacity, sketch.config.frame_len, sketch.num_slices, scans, exacts)
    w = buffers(workspace, q.device, *shape)
    return Plan(
        workspace=w,
        sketch=sketch,
        rule=rule,
        keys=keys,
        values=values,
        block_table=block_table,
        place=(sketch.num_blocks, *ends),
        scales=scales_on(q.device),
        scale=scale,
        rows=rows,
        group=group,
        num_kv_heads=num_kv_heads,
        room=w.listed.shape[1],
        choice=(
            round(rule.share * (1 << SHARE_BITS)),
            TOLERANCE,
            min(max(1, rule.count), MOST_KEYS),
            min(max(rule.tau or 0.0, -1e30), 1e30),
            rule.unread_mass,
        ),
        rounding=(*rounded_query_slack(head_dim), radius_inflation(head_dim + 16)),
        fixed=rule.drop and rule.tau is not None,
    )
