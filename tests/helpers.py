"""Hard inputs, and the float64 truth that everything is judged against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from louver.index import SketchIndex
from louver.policies import BasePolicy, parse
from louver.sketch import Sketch, SketchConfig

TRAITS = (
    "spread",  # key norms over a factor of 2,500
    "offset",  # channel offsets up to 1e4, as real models have
    "duplicates",
    "lattice",  # small whole numbers: many exact ties, and float64 scores without rounding
    "zero_query",
    "subnormal",
    "huge",  # some keys far beyond a float16 center
    "lopsided",  # one channel carries nearly all of the query and none of the keys
    "flat",  # keys that hardly differ within a block
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """One layer's decode step: a query per head, the cache, and which tokens of each row are real."""

    q: Tensor
    keys: Tensor
    values: Tensor
    kv_start: Tensor
    kv_len: Tensor
    config: SketchConfig
    traits: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.keys.shape))
        rows = list(zip(self.kv_start.tolist(), self.kv_len.tolist(), strict=True))
        return (
            f"Case({shape}, {self.q.shape[1]} query heads, {self.q.dtype}, {rows}, {set(self.traits)}, {self.config})"
        )

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.keys.shape[1]

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def valid(self) -> Tensor:
        """Bool [batch, 1, kv_len]."""
        position = torch.arange(self.keys.shape[2])
        return ((position >= self.kv_start[:, None]) & (position < self.kv_len[:, None]))[:, None]

    def index(self, backend: str = "auto", **changes) -> SketchIndex:
        given = dict(keys=self.keys, values=self.values, kv_start=self.kv_start, kv_len=self.kv_len)
        given |= dict(config=self.config, backend=backend) | changes
        return SketchIndex.build(**given)


def build_case(
    seed: int,
    *,
    kv_len: int,
    head_dim: int = 64,
    group_size: int = 2,
    num_kv_heads: int = 2,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    traits: frozenset[str] = frozenset(),
    ragged: bool = False,
    config: SketchConfig | None = None,
) -> Case:
    """A case with the given traits; the same arguments give the same case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def some(n: int) -> Tensor:
        return torch.rand(n, generator=generator) < 0.2

    keys = normal(batch, num_kv_heads, kv_len, head_dim)
    values = normal(batch, num_kv_heads, kv_len, head_dim)
    q = normal(batch, num_kv_heads * group_size, head_dim)
    largest = 6e4 if dtype == torch.float16 else 1e30
    if "flat" in traits:
        keys = keys * 1e-4 + normal(1, 1, 1, head_dim)
    if "spread" in traits:
        keys = keys * 10 ** (3.4 * torch.rand(kv_len, 1, generator=generator) - 1)
    if "offset" in traits:
        keys = keys + 1e4 * normal(1, 1, 1, head_dim).clamp(-1, 1) * some(head_dim)
        values = values + 100 * normal(1, 1, 1, head_dim) * some(head_dim)
    if "lopsided" in traits:
        q[..., 0] = 1e4 if dtype == torch.float16 else 1e25
        keys[..., 0] = 0
        keys[..., head_dim // 2 :] *= 100
    if "lattice" in traits:
        keys, q = keys.clamp(-1e4, 1e4).round(), (2 * q).clamp(-1e4, 1e4).round()
    if "subnormal" in traits:
        keys[:, :, some(kv_len)] *= 1e-6 if dtype == torch.float16 else 1e-40
        q[:, ::2] *= 1e-6 if dtype == torch.float16 else 1e-38
    if "huge" in traits:
        keys[:, :, some(kv_len)] *= largest
    if "duplicates" in traits and kv_len:
        copied = torch.randint(kv_len, (kv_len,), generator=generator)
        keys = torch.where(some(kv_len)[:, None], keys[:, :, copied], keys)
    if "zero_query" in traits:
        q[:, 0] = 0
    start, end = torch.zeros(batch, dtype=torch.int32), torch.full((batch,), kv_len, dtype=torch.int32)
    if ragged:
        start = torch.randint(kv_len + 1, (batch,), generator=generator, dtype=torch.int32)
        start[0] = 0
        end = start + ((kv_len - start) * torch.rand(batch, generator=generator).add(0.5).clamp(max=1)).int()
    return Case(
        q=q.clamp(-largest, largest).to(dtype),
        keys=keys.clamp(-largest, largest).to(dtype),
        values=values.to(dtype),
        kv_start=start,
        kv_len=end,
        config=config or SketchConfig(frame_len=16),
        traits=traits,
    )


def true_scores(case: Case) -> Tensor:
    """q . k in float64, [batch, num_q_heads, kv_len]; NaN where there is no token."""
    scores = grouped(case.q.double(), case) @ case.keys.double().mT
    return scores.flatten(1, 2).masked_fill(~case.valid(), torch.nan)


def absolute_scores(case: Case) -> Tensor:
    """|q| . |k| in float64: what rounding is measured against."""
    return (grouped(case.q.double().abs(), case) @ case.keys.double().abs().mT).flatten(1, 2)


def grouped(x: Tensor, case: Case) -> Tensor:
    return x.unflatten(1, (case.keys.shape[1], -1))


def true_attention(case: Case, kept: Tensor | None = None) -> Tensor:
    """Softmax attention in float64 over the valid tokens (of those kept); 0 where there are none."""
    logits = true_scores(case) * case.softmax_scale
    present = case.valid() if kept is None else case.valid() & kept
    weights = torch.where(present, logits, -torch.inf).softmax(-1)
    weights = torch.where(present, weights, 0.0)  # a row without tokens has no softmax
    values = torch.where(case.valid()[..., None], case.values.double(), 0.0)
    return (grouped(weights, case) @ values).flatten(1, 2)


def true_masses(case: Case) -> Tensor:
    """Each key's share of the softmax mass, float64 [batch, num_q_heads, kv_len]."""
    logits = torch.where(case.valid(), true_scores(case) * case.softmax_scale, -torch.inf)
    return torch.where(case.valid(), logits.softmax(-1), 0.0)


def some_taus(case: Case, seed: int) -> list[Tensor]:
    """Thresholds that hurt: exactly a key's score (a tie), the smallest and largest, infinities."""
    scores = true_scores(case)
    if not scores.shape[-1]:
        return [torch.zeros(scores.shape[:2])]
    generator = torch.Generator().manual_seed(seed)
    known = torch.nan_to_num(scores, nan=-1e38).clamp(-1e38, 1e38)
    ordered = known.sort(-1, descending=True).values
    ranks = torch.randint(scores.shape[-1], scores.shape[:2], generator=generator)
    top = torch.full_like(ranks, min(3, scores.shape[-1] - 1))
    at = [ordered.gather(-1, r[..., None])[..., 0].float() for r in (ranks, top)]
    infinite = torch.full_like(at[0], torch.inf)
    return [*at, ordered[..., 0].float(), -infinite, infinite]


def assert_nothing_lost(selected: Tensor, case: Case, tau: Tensor) -> None:
    """Every valid key whose real score reaches tau is selected (what float64 itself may round is let pass)."""
    fuzz = 0.0 if "lattice" in case.traits else case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    relevant = case.valid() & (true_scores(case) - fuzz >= tau.double()[..., None])
    lost = relevant & ~selected
    assert not lost.any(), f"{int(lost.sum())} of {int(relevant.sum())} keys above tau were lost"


def assert_extras_within_slack(selected: Tensor, case: Case, tau: Tensor) -> None:
    """What was selected is valid, and below tau by no more than twice the rounding of a float32 dot product."""
    slack = 2.1 * (case.q.shape[2] + 1) * 2.0**-24 * absolute_scores(case) + 2.0**-94
    score = true_scores(case)
    far_below = score < torch.where(torch.isfinite(tau), tau, tau).double()[..., None] - slack
    assert not (selected & ~case.valid()).any(), "a padding token was selected"
    assert not (selected & far_below & (absolute_scores(case) < 1e37)).any(), "a key far below tau was selected"


def within_certificate(case: Case, result) -> Tensor:
    """Whether |truth - out| <= certificate + arithmetic bound, per row and query head."""
    error = (true_attention(case) - result.out.double()).norm(dim=-1)
    bound = result.certificate.double() + result.arithmetic_bound.double()
    return error <= bound * (1 + 1e-9) + 1e-12


def assert_same_sketch(one: Sketch, other: Sketch) -> None:
    """Every closed block of every row is the same, bit for bit."""
    assert torch.equal(one.num_blocks, other.num_blocks)
    for (name, x), (_, y) in zip(one.tensors(), other.tensors(), strict=True):
        per_block = name not in ("num_blocks", "query_weight", "value_mean")
        for row, count in enumerate(one.num_blocks.tolist()):
            a, b = (t[row, :, :count] if per_block else t[row] for t in (x, y))
            assert torch.equal(a, b), f"{name} differs in row {row}"


def policies_to_try(kv_len: int, num_q_heads: int) -> list[BasePolicy]:
    specs = ["exact:0.01", "exact:0.2+sinks:2+recent:3", "exact:1.0", "exact:0.05+unread:0", "exact:0.05+unread:0.9"]
    specs += [
        "topk:1",
        "topk:5",
        f"topk:{kv_len + 1}",
        "budget:0.1",
        "budget:0.5+recent:4",
        "fixed:0",
        "fixed:3.5",
        "mass:0.001",
        "mass:0.1+recent:4",
        "mass:0.7",
        "relative:0",
        "relative:4+sinks:2",
        "error:0.001",
        "error:0.05",
        "error:0.5+sinks:1",
        "topk:3|mass:0.2",
        "relative:1|budget:0.3|fixed:2",
        "exact:0.05|exact:0.2+unread:0",
        "sample-max",
        "sample-topk:3+size:16+seed:5",
        "sample-mean-max",
        "sample-gap+size:20",
        "sample-budget:0.2|mass:0.3",
        "dense",
    ]
    if num_q_heads % 2 == 0:
        specs.append("fixed:1/fixed:3.5+sinks:1")
    return [parse(s) for s in specs]
