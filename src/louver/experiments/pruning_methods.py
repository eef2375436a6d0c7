"""What the pruning experiment compares: each method says which keys it can't rule out, and what it reads.

Queries of many positions stand side by side as further heads of their KV head: q [kv_heads, rows, head_dim].
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from louver.experiments.capture import Layer
from louver.experiments.codecs import CODECS, Plane
from louver.geometry.metric import Metric
from louver.index.ball import BallIndex
from louver.index.sketch import SketchIndex
from louver.protocols import Guarantee

Mask = Bool[Tensor, "kv_heads rows n"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """The measured queries of one layer and a threshold for each; scores float64, -inf where a query may not look."""

    layer: Layer
    fitting: Float[Tensor, "num_q_heads m head_dim"]
    q: Float[Tensor, "kv_heads rows head_dim"]
    scores: Float[Tensor, "kv_heads rows n"]
    tau: Float[Tensor, "kv_heads rows"]

    @property
    def relevant(self) -> Mask:
        """The keys that must be found."""
        return self.scores >= self.tau[..., None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The keys read in full, those whose second plane was read, and figures of its own; bytes are per key of the cache."""

    candidates: Mask
    index_bytes_per_key: float
    second: Mask | None = None
    second_bytes: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """A way to prune. ``prepare`` once per layer, then ``answer`` per threshold."""

    @property
    def guarantee(self) -> Guarantee: ...
    @property
    def work_per_key(self) -> float:
        """Multiplications of a query's bounds, per key of the cache and channel."""
        ...

    def fields(self) -> dict[str, Any]: ...
    def prepare(self, layer: Layer, fitting: Tensor) -> Any: ...
    def answer(self, prepared: Any, question: Question) -> Answer: ...


@dataclass(frozen=True, kw_only=True)
class BallMethod:
    """BallIndex under one of the rules sum, ta, and, oracle-and. ``options`` are BallConfig's fields."""

    rule: str
    options: tuple[tuple[str, Any], ...]
    name: str = "ball"

    @property
    def guarantee(self) -> Guarantee:
        """The oracle's thresholds come from the answer itself, which nobody has when decoding."""
        return "none" if self.rule == "oracle-and" else "exact"

    @property
    def work_per_key(self) -> float:
        """A centre per group in every subspace, whose widths add up to head_dim; a box has two corners."""
        options = dict(self.options)
        return (2 if options.get("enclosure") == "box" else 1) / options["group_len"]

    def fields(self) -> dict[str, Any]:
        """Row fields."""
        return {"index": self.name, "rule": self.rule, **dict(self.options)}

    def prepare(self, layer: Layer, fitting: Tensor) -> BallIndex:
        """The index over all keys."""
        return BallIndex.build(layer.keys[None].float(), **dict(self.options))

    def answer(self, prepared: BallIndex, question: Question) -> Answer:
        """Keys the rule can't rule out."""
        q, tau = question.q.flatten(0, 1)[None], question.tau.flatten()[None]
        down = tau.float()
        down = torch.where(down.double() > tau, torch.nextafter(down, torch.full_like(down, -torch.inf)), down)
        n = question.layer.keys.shape[1]
        cost = float(prepared.bytes_per_search[0, 0]) / n
        figures: dict[str, float] = {}
        if self.rule in ("sum", "ta"):
            found = prepared.candidates(q, down, self.rule)
            if self.rule == "ta":
                row, bounds = next(prepared.row_bounds(q))
                figures["seen_fraction"] = row.seen_by_ta(bounds, down.view(question.tau.shape)).float().mean().item()
        else:
            oracle = self.rule == "oracle-and"
            cuts, figures = _oracle_cuts(prepared, question) if oracle else (_sound_cuts(prepared, q, down), figures)
            found = prepared.candidates_in_all(q, cuts)
        return Answer(candidates=found[0].view(question.scores.shape), index_bytes_per_key=cost, figures=figures)


def _sound_cuts(index: BallIndex, q: Tensor, tau: Tensor) -> Tensor:
    """A key that scores tau scores in subspace s at least tau less the best that all other subspaces could add."""
    _, bounds = next(index.row_bounds(q))
    best = (bounds.upper.amax(-1) + bounds.slack).transpose(1, 2).flatten(0, 1)  # rows subspaces
    others = best.sum(-1, keepdim=True) - best
    return (tau[0][:, None] - others - 1e-5 * best.abs().sum(-1, keepdim=True))[None]


def _oracle_cuts(index: BallIndex, question: Question) -> tuple[Tensor, dict[str, float]]:
    """Per-subspace minima over the true top, and how far the slices' filters are from independent."""
    q, keys = (index.split.split(x).double() for x in (question.q, question.layer.keys))
    allowed, relevant = torch.isfinite(question.scores), question.relevant
    cuts, joint, product = [], allowed, torch.ones(question.tau.shape, dtype=torch.float64)
    for s in range(index.split.count):
        part = q[:, :, s] @ keys[:, :, s].mT
        cut = torch.where(relevant, part, torch.inf).amin(-1)
        passed = allowed & (part >= cut[..., None])
        joint = joint & passed
        product = product * passed.sum(-1) / allowed.sum(-1)
        cuts.append(cut.flatten())
    return torch.stack(cuts, -1)[None].float(), {
        "joint_pass_fraction": (joint.sum(-1) / allowed.sum(-1)).mean().item(),
        "product_pass_fraction": product.mean().item(),
    }


@dataclass(frozen=True, kw_only=True)
class CodecMethod:
    """A code per key with one plane or two. The sketch as it ships answers for codec "frames" with one plane."""

    codec: str
    metric: str
    planes: int

    @property
    def guarantee(self) -> Guarantee:
        """Bounds lose nothing."""
        return "exact"

    @property
    def work_per_key(self) -> float:
        """A code per channel; the second plane's are read for survivors only."""
        return 1.0

    def fields(self) -> dict[str, Any]:
        """Row fields."""
        return {"index": "sketch", "rule": "sum", "codec": self.codec, "planes": self.planes, "metric": self.metric}

    def prepare(self, layer: Layer, fitting: Tensor) -> list[Plane]:
        """Both planes of all keys."""
        return replace(CODECS[self.codec], metric=self.metric).encode(layer.keys, fitting)

    def answer(self, prepared: list[Plane], question: Question) -> Answer:
        """Keys that the bounds of all planes read can't rule out."""
        q, tau = question.q.double(), question.tau[..., None]
        found = ~(prepared[0].upper(q) < tau)
        if self.planes == 1:
            return Answer(candidates=found, index_bytes_per_key=prepared[0].bytes_per_key)
        return Answer(
            candidates=found & ~(prepared[1].upper(q) < tau),
            index_bytes_per_key=prepared[0].bytes_per_key,
            second=found,
            second_bytes=prepared[1].bytes_per_key,
        )


@dataclass(frozen=True, kw_only=True)
class SketchMethod:
    """SketchIndex as it ships, in its own float32 arithmetic."""

    metric: Metric

    @property
    def guarantee(self) -> Guarantee:
        """Bounds lose nothing."""
        return "exact"

    @property
    def work_per_key(self) -> float:
        """A code per channel."""
        return 1.0

    def fields(self) -> dict[str, Any]:
        """Row fields."""
        return {"index": "sketch", "rule": "sum", "codec": "sketch", "planes": 1, "metric": self.metric}

    def prepare(self, layer: Layer, fitting: Tensor) -> SketchIndex:
        """The index over all keys."""
        from louver.sketch import SketchConfig

        config = SketchConfig(metric=self.metric)
        keys = layer.keys[None].float()
        return SketchIndex.build(keys, metric_queries=fitting[None], config=config, backend="reference")

    def answer(self, prepared: SketchIndex, question: Question) -> Answer:
        """Keys the sketch can't rule out, those of the open block included."""
        found = prepared.bounds(question.q.flatten(0, 1)[None], 1.0)
        heads, rows, n = question.scores.shape
        candidates = torch.ones(heads, rows, n, dtype=torch.bool)
        sketched = found.undecided.shape[2]
        ruled_out = found.upper[0].unflatten(0, (heads, rows)).double() < question.tau[..., None]
        candidates[..., :sketched] = ~(ruled_out & found.undecided[0][:, None])
        return Answer(candidates=candidates, index_bytes_per_key=float(prepared.bytes_per_search[0, 0]) / n)


def in_turn(methods: list[Method]) -> Iterator[tuple[Method, bool]]:
    """Methods, and whether each can go on with what the one before it prepared."""
    last: Any = None
    for method in methods:
        key = _preparation(method)
        yield method, key is not None and key == last
        last = key


def _preparation(method: Method) -> Any:
    if isinstance(method, BallMethod):
        return method.options
    return (method.codec, method.metric) if isinstance(method, CodecMethod) else None
