"""Grouping: which keys share an enclosure. Any grouping is sound; a good one makes small groups, hence tight bounds.

``kcenter``: groups of exactly group_len, peeled off from the outside: the point farthest from the middle, with its nearest.
``kmeans``: Lloyd's algorithm; group_len on average. ``consecutive``: neighbours in time. The first two work inside cells of
a few hundred keys that halving at medians makes, so the cost stays linear in the number of keys.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import PolicyError

Grouping = Literal["kcenter", "consecutive", "kmeans"]
LLOYD_ROUNDS = 8


def group_points(
    points: Float[Tensor, "lead n width"], group_len: int, grouping: Grouping = "kcenter", cell_len: int = 512
) -> tuple[Int[Tensor, "lead n"], int]:
    """The group of every point, and how many groups there are (some may be empty).

    Raises:
        PolicyError: an unknown grouping, or group_len below 1.
    """
    lead, n, _ = points.shape
    if group_len < 1:
        raise PolicyError(f"group_len={group_len}; wanted at least 1")
    if grouping not in get_args(Grouping):
        raise PolicyError(f"grouping={grouping!r} is unknown; wanted one of {', '.join(get_args(Grouping))}")
    if n == 0:
        return points.new_zeros(lead, 0, dtype=torch.int64), 0
    if grouping == "consecutive":
        return (torch.arange(n, device=points.device) // group_len).expand(lead, n), -(-n // group_len)
    cells = _halve(points, max(cell_len, group_len), group_len)
    num_cells, length = cells.shape[1:]
    inside = _gather(points, cells).flatten(0, 1)
    choose = _peel if grouping == "kcenter" else _lloyd
    local = choose(inside, group_len).unflatten(0, (lead, num_cells))
    first = torch.arange(num_cells, device=points.device) * (length // group_len)
    group = (local + first[:, None]).flatten(1)
    out = torch.empty(lead, n, dtype=torch.int64, device=points.device)
    return out.scatter_(1, cells.flatten(1), group), num_cells * (length // group_len)


def _halve(points: Tensor, cell_len: int, group_len: int) -> Int[Tensor, "lead cells length"]:
    """Cells of at most cell_len points, by halving at the median of the channel that varies most.

    The length is a multiple of group_len; the last point stands in for the places that are left over.
    """
    lead, n, _ = points.shape
    num_cells = 1
    while n > num_cells * cell_len:
        num_cells *= 2
    length = -(-n // (num_cells * group_len)) * group_len
    cells = torch.arange(num_cells * length, device=points.device).clamp_max(n - 1).expand(lead, 1, -1)
    while cells.shape[1] < num_cells:
        inside = _gather(points, cells)
        widest = inside.var(2, correction=0).argmax(-1)[..., None, None]
        order = inside.gather(3, widest.expand(*cells.shape, 1))[..., 0].sort(dim=-1, stable=True).indices
        cells = cells.gather(2, order).unflatten(2, (2, -1)).flatten(1, 2)
    return cells


def _peel(x: Float[Tensor, "cells length width"], group_len: int) -> Int[Tensor, "cells length"]:
    x = x - x.mean(1, keepdim=True)
    square = x.square().sum(-1)
    taken = torch.zeros_like(square)  # +inf where a point has a group
    group = torch.zeros(square.shape, dtype=torch.int64, device=x.device)
    for i in range(x.shape[1] // group_len):
        seed = (square - taken).argmax(1)
        at_seed = x.gather(1, seed[:, None, None].expand(-1, 1, x.shape[2]))
        distance = torch.baddbmm(square[..., None], x, at_seed.mT, alpha=-2.0)[..., 0] + taken
        distance.scatter_(1, seed[:, None], -torch.inf)
        members = distance.topk(group_len, 1, largest=False).indices
        group.scatter_(1, members, i)
        taken.scatter_(1, members, torch.inf)
    return group


def _lloyd(x: Float[Tensor, "cells length width"], group_len: int) -> Int[Tensor, "cells length"]:
    num_groups = x.shape[1] // group_len
    center = x[:, ::group_len]
    group = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    for _ in range(LLOYD_ROUNDS):
        distance = torch.baddbmm(center.square().sum(-1)[:, None], x, center.mT, alpha=-2.0)
        group = distance.argmin(-1)
        count = x.new_zeros(x.shape[0], num_groups).scatter_add_(1, group, torch.ones_like(group, dtype=x.dtype))
        total = torch.zeros_like(center).scatter_add_(1, group[..., None].expand_as(x), x)
        center = torch.where(count[..., None] > 0, total / count.clamp_min(1)[..., None], center)
    return group


def _gather(points: Tensor, cells: Int[Tensor, "lead cells length"]) -> Float[Tensor, "lead cells length width"]:
    index = cells.flatten(1)[..., None].expand(-1, -1, points.shape[2])
    return points.gather(1, index).unflatten(1, cells.shape[1:])
