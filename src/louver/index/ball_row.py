"""One batch row of a BallIndex: its folded tokens, their groups in every subspace, and bounds on their scores.

With u_s(g) the upper bound of group g in subspace s, a key's score is at most sum_s u_s(group_s(key)) (SUM). Fagin's rule (TA)
finds the same keys: walk all subspaces' groups in step, the highest bound first, and stop where the sum of a row of bounds is
below tau. A key not met by then is, in every subspace, below that row. Source: Fagin, Lotem, Naor, JCSS 66 (2003), with upper
bounds in the place of grades. Rounding: docs/guarantee.md, "Balls, boxes, subspaces".
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.errors import PolicyError
from louver.geometry.ball import LARGEST_NORM, Balls, group_means, query_norm
from louver.geometry.box import Boxes
from louver.geometry.grouping import Grouping, group_points
from louver.geometry.rounding import ABSOLUTE, SAFETY, gamma, norm_above
from louver.geometry.subspaces import Slicing, Subspaces
from louver.kernels.reference.groups import add_up, at_keys
from louver.kernels.reference.product import true_float32

CELL_KEYS = 8192  # a cell holds CELL_KEYS / subspaces keys: building costs the same for any number of subspaces


@dataclass(frozen=True, kw_only=True)
class BallConfig:
    """How keys are grouped and enclosed. Every field changes speed and bytes; none changes which keys are found."""

    subspaces: int = 16  # slices of head_dim, each with groups of its own: more bound tighter and cost more bytes
    group_len: int = 4  # keys per group
    grouping: Grouping = "kcenter"
    center: Literal["mean", "key"] = "mean"  # "key": a key of the group stands for its center and costs no memory
    enclosure: Literal["ball", "box"] = "ball"
    slicing: Slicing = "contiguous"
    rule: Literal["sum", "ta"] = "sum"  # how a search runs if it is not told
    buffer_len: int = 256  # recent keys that are scanned until so many are there to be folded in
    seed: int = 0  # of the random slicings

    def __post_init__(self) -> None:
        if self.group_len < 1 or self.buffer_len < 1:
            raise PolicyError(f"group_len={self.group_len} and buffer_len={self.buffer_len} must be at least 1")
        for name, choices in (("center", ("mean", "key")), ("enclosure", ("ball", "box")), ("rule", ("sum", "ta"))):
            if getattr(self, name) not in choices:
                raise PolicyError(f"{name}={getattr(self, name)!r} is unknown; wanted {choices[0]!r} or {choices[1]!r}")
        if self.grouping not in get_args(Grouping):
            raise PolicyError(f"grouping={self.grouping!r} is unknown; wanted one of {', '.join(get_args(Grouping))}")
        if self.center == "key" and self.enclosure == "box":
            raise PolicyError("center='key' has no meaning for boxes; use enclosure='ball'")


@dataclass(frozen=True, kw_only=True)
class GroupBounds:
    """Bounds of every group for the queries of one row, float32: slack is per subspace, total_slack for their sum."""

    estimate: Float[Tensor, "heads subspaces group_size groups"]
    half_width: Float[Tensor, "heads subspaces group_size groups"]
    slack: Float[Tensor, "heads subspaces group_size"]
    total_slack: Float[Tensor, "heads group_size"]

    @property
    def upper(self) -> Float[Tensor, "heads subspaces group_size groups"]:
        """Upper bounds before their slack."""
        return self.estimate + self.half_width


@dataclass(frozen=True, kw_only=True)
class BallRow:
    """The folded tokens of one row. Never written to, so rows may share one."""

    group: Int[Tensor, "heads subspaces folded"]  # int16 while it fits
    enclosure: Balls | Boxes  # of [heads, subspaces, groups]; a ball about a key has no center here
    center_key: Int[Tensor, "heads subspaces groups"] | None  # int32, the key that is the center
    bounded: Bool[Tensor, "heads folded"]  # False: not finite or too long to enclose, so always scanned

    @property
    def num_folded(self) -> int:
        """Tokens with a group."""
        return self.group.shape[2]

    @property
    def num_groups(self) -> int:
        """Groups per subspace."""
        enclosure = self.enclosure
        return (enclosure.radius if isinstance(enclosure, Balls) else enclosure.half).shape[2]

    def tensors(self) -> list[Tensor]:
        """Everything the row holds."""
        parts = [self.group, self.bounded, *vars(self.enclosure).values()]
        return parts if self.center_key is None else [*parts, self.center_key]

    def search_bytes(self, width: int) -> int:
        """Bytes one search reads per KV head; centers that are keys are read from a 16-bit cache."""
        per_head = [x[0] for x in self.tensors() if x is not self.bounded]
        centers = 0 if self.center_key is None else self.center_key[0].numel() * width * 2
        return sum(x.numel() * x.element_size() for x in per_head) + centers

    def bounds(self, q: Tensor, keys: Tensor, split: Subspaces) -> GroupBounds:
        """Bounds for q [heads, group_size, head_dim] over keys [heads, row_len, head_dim]."""
        x = split.split(q).transpose(1, 2)  # heads subspaces group_size width
        enclosure = self.enclosure
        if self.center_key is not None:
            assert isinstance(enclosure, Balls)
            enclosure = replace(enclosure, center=_keys_at(split.split(_clean(keys)[0]), self.center_key))
        largest = enclosure.reach().amax(-1) if enclosure.center.shape[2] else x.new_zeros(x.shape[:2])
        norm = query_norm(x) * (1 + 1e-3)  # so that the slack overflows before any sum it stands for
        reach = norm * largest[..., None]
        turned = x.new_zeros(x.shape[0], 1, x.shape[2])  # what the rotation's rounding moves a score by
        if split.rotation is not None:
            turned = split.rounding * norm_above(norm.movedim(1, -1))[:, None] * norm_above(largest)[:, None, None]
        terms = split.count * split.width + split.count + 24
        with true_float32(x.device):
            estimate, half_width = x @ enclosure.center.float().mT, enclosure.half_width(x)
        return GroupBounds(
            estimate=estimate,
            half_width=half_width,
            slack=SAFETY * gamma(split.width + 24) * reach + turned + ABSOLUTE,
            total_slack=SAFETY * gamma(terms) * reach.sum(1) + turned[:, 0] + ABSOLUTE,
        )

    def add_up(self, of_groups: Float[Tensor, "heads subspaces group_size groups"]) -> Float[Tensor, "heads rows n"]:
        """Sum over subspaces of what each key's groups have."""
        return add_up(self.group, of_groups)

    def seen_by_ta(self, bounds: GroupBounds, tau: Float[Tensor, "heads group_size"]) -> Bool[Tensor, "heads rows n"]:
        """The keys that Fagin's rule meets before it stops."""
        upper = bounds.upper
        present = torch.zeros(upper.shape[0], upper.shape[1], upper.shape[3], dtype=torch.bool, device=upper.device)
        present.scatter_(-1, self.group.long(), True)
        ordered, order = torch.where(present[:, :, None], upper, -torch.inf).sort(-1, descending=True)
        row = ordered[:, 0]
        for s in range(1, ordered.shape[1]):
            row = row + ordered[:, s]
        depth = (~(row + bounds.total_slack[..., None] < tau[..., None])).sum(-1)  # rows descend, so these come first
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order).to(order))
        seen = at_keys(self.group, place, 0) < depth[..., None]
        for s in range(1, ordered.shape[1]):
            seen = seen | (at_keys(self.group, place, s) < depth[..., None])
        return seen


def empty_row(num_kv_heads: int, split: Subspaces, config: BallConfig, device: torch.device) -> BallRow:
    """A row with nothing folded in."""
    lead = (num_kv_heads, split.count, 0)
    width = 0 if config.center == "key" else split.width
    center = torch.empty(*lead, width, dtype=torch.float16, device=device)
    boxes = config.enclosure == "box"
    ball = Balls(center=center, radius=torch.empty(lead, dtype=torch.float16, device=device))
    return BallRow(
        group=torch.empty(lead, dtype=torch.int16, device=device),
        enclosure=Boxes(center=center, half=center) if boxes else ball,
        center_key=torch.empty(lead, dtype=torch.int32, device=device) if config.center == "key" else None,
        bounded=torch.empty(num_kv_heads, 0, dtype=torch.bool, device=device),
    )


def fold(row: BallRow, keys: Float[Tensor, "heads row_len head_dim"], split: Subspaces, config: BallConfig) -> BallRow:
    """The row with all tokens of keys past the folded ones grouped among themselves."""
    new, bounded = _clean(keys[:, row.num_folded :])
    points = split.split(new).transpose(1, 2).contiguous()  # heads subspaces new width
    cell_len = max(256, CELL_KEYS // split.count)
    flat, num_groups = group_points(points.flatten(0, 1), config.group_len, config.grouping, cell_len)
    group = flat.unflatten(0, points.shape[:2])
    keep = bounded[:, None].expand(group.shape)
    fresh, center_key = _enclose(points, group, num_groups, keep, config)
    old = row.enclosure
    joined = {name: torch.cat([getattr(old, name), part], 2) for name, part in vars(fresh).items()}
    if center_key is not None and row.center_key is not None:
        center_key = torch.cat([row.center_key, (center_key + row.num_folded).int()], 2)
    first = row.num_groups
    dtype = torch.int16 if first + num_groups < 2**15 else torch.int32
    return BallRow(
        group=torch.cat([row.group.to(dtype), (group + first).to(dtype)], 2),
        enclosure=type(fresh)(**joined),
        center_key=center_key,
        bounded=torch.cat([row.bounded, bounded], 1),
    )


def cut(row: BallRow, keys: Tensor, row_len: int, split: Subspaces, config: BallConfig) -> BallRow:
    """The row without its tokens from row_len on. Enclosures still hold what is left; lost centers are chosen anew."""
    if row_len >= row.num_folded:
        return row
    if row_len == 0:
        return empty_row(row.group.shape[0], split, config, row.group.device)
    row = replace(row, group=row.group[:, :, :row_len], bounded=row.bounded[:, :row_len])
    if row.center_key is None:
        return row
    points = split.split(_clean(keys[:, :row_len])[0]).transpose(1, 2)
    keep = row.bounded[:, None].expand(row.group.shape)
    balls, center_key = _enclose(points, row.group.long(), row.center_key.shape[2], keep, config)
    assert center_key is not None and isinstance(balls, Balls)
    return replace(row, enclosure=balls, center_key=center_key.int())


def _enclose(
    points: Tensor, group: Tensor, num_groups: int, keep: Tensor, config: BallConfig
) -> tuple[Balls | Boxes, Tensor | None]:
    center = group_means(points, group, num_groups, keep)
    if config.enclosure == "box":
        return Boxes.fit(points, center, group, keep), None
    if config.center == "mean":
        return Balls.fit(points, center.half(), group, keep), None
    # The member nearest to the mean. An empty group gets any key: nothing asks for it.
    away = (points - center.gather(2, group[..., None].expand(points.shape))).square().sum(-1)
    away = torch.where(keep, away, torch.inf)
    nearest = away.new_full(center.shape[:3], torch.inf).scatter_reduce(2, group, away, "amin")
    position = torch.arange(points.shape[2], device=points.device).expand(group.shape)
    is_nearest = keep & (away == nearest.gather(2, group))
    center_key = torch.zeros(center.shape[:3], dtype=torch.int64, device=points.device)
    center_key = center_key.scatter_reduce(2, group, torch.where(is_nearest, position, 0), "amax")
    balls = Balls.fit(points, _at(points, center_key), group, keep)
    return replace(balls, center=balls.center[..., :0].half()), center_key


def _keys_at(slices: Float[Tensor, "heads row_len subspaces width"], center_key: Tensor) -> Tensor:
    return _at(slices.transpose(1, 2), center_key.long())


def _at(points: Float[Tensor, "heads subspaces n width"], index: Int[Tensor, "heads subspaces m"]) -> Tensor:
    return points.gather(2, index[..., None].expand(-1, -1, -1, points.shape[3]))


def _clean(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in float32, zero where no enclosure can hold them, and where that is not so."""
    x = keys.float()
    bounded = torch.isfinite(x).all(-1) & (query_norm(torch.nan_to_num(x)) <= LARGEST_NORM)
    return torch.where(bounded[..., None], x, 0.0), bounded
