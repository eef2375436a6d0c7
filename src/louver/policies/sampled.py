"""sample-...: the paper's estimators of a threshold, from the scores of a random sample of the keys.

    sample-max          the largest score of the sample
    sample-topk:K       the K-th largest score of the sample
    sample-mean-max     halfway between the sample's mean and its largest score
    sample-gap          the score above the widest gap between neighbours in the upper half of the sorted sample
    sample-budget:F     the score that the share F of the sample reaches

The set returned for a threshold is exact: no key that reaches it is lost. The threshold itself is a guess, and nothing is proven of
what lies below it: guarantee "none". They are here to be measured against policies that need no guess (docs/policies.md).
Source: the estimators of arXiv 2605.06763, on a reservoir sample (kernels/reference/sample.py).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from louver.errors import PolicyError
from louver.policies.base import BasePolicy, check_fraction, number
from louver.protocols import BoundSummary, Cuts, Guarantee, Sample
from louver.shapes import PerQueryHead


@dataclass(frozen=True, kw_only=True)
class Sampled(BasePolicy):
    """Keep the keys whose score reaches an estimate. A row with fewer keys than ``size`` is sampled whole."""

    drops: ClassVar[bool] = True
    guarantee: ClassVar[Guarantee] = "none"
    size: int = 256  # keys of the sample, per row; changes results
    seed: int = 0  # which keys; changes results

    def check(self) -> None:
        """A sample needs a key."""
        if self.size < 1:
            raise PolicyError(f"{self.name} with size={self.size} sees nothing; wanted at least 1")

    @property
    def sample(self) -> Sample:
        """The keys to look at."""
        return Sample(self.size, self.seed)

    @property
    def spec(self) -> str:
        """The canonical specification; size and seed are named where they are not the defaults."""
        head, *rest = super().spec.split("+")
        head += "".join(f"+{n}:{x}" for n in ("size", "seed") if (x := getattr(self, n)) != getattr(type(self), n))
        return "+".join([head, *rest])

    def cuts(self, summary: BoundSummary) -> Cuts:
        """The estimate from the sampled scores."""
        assert summary.sample is not None, "a sampled policy asks for a sample"
        tau = self.threshold(summary.sample)
        return Cuts(unread=tau, fine=tau, exact=tau)

    def threshold(self, sample: torch.Tensor) -> PerQueryHead:
        """tau from the sampled scores [batch, num_q_heads, size]; NaN past a short row's end."""
        known = ~torch.isnan(sample)
        scores = sample.masked_fill(~known, -torch.inf).sort(-1, descending=True).values
        count = known.sum(-1)
        tau = torch.where(count > 0, self.estimate(scores, count), -torch.inf)
        return tau.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """tau from scores [batch, num_q_heads, size], descending, of which the first count [batch, num_q_heads] exist."""
        raise NotImplementedError


def _at(scores: torch.Tensor, rank: torch.Tensor | int, count: torch.Tensor) -> torch.Tensor:
    """The rank-th largest score, counted from 1; the smallest where there are fewer."""
    nth = count.clamp_max(rank) if isinstance(rank, int) else torch.minimum(rank, count)
    place = nth.clamp_min(1) - 1
    return scores.gather(-1, place[..., None].long())[..., 0]


@dataclass(frozen=True, kw_only=True)
class SampleMax(Sampled):
    """tau is the sample's largest score."""

    name: ClassVar[str] = "sample-max"

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """The first."""
        return scores[..., 0]


@dataclass(frozen=True, kw_only=True)
class SampleTopK(Sampled):
    """tau is the sample's K-th largest score."""

    name: ClassVar[str] = "sample-topk"
    k: int  # rank within the sample; changes results

    def check(self) -> None:
        """A rank that the sample has."""
        super().check()
        if not 1 <= self.k <= self.size:
            raise PolicyError(f"sample-topk:{self.k} is no rank in a sample of {self.size} keys")

    def argument(self) -> str:
        """The rank."""
        return str(self.k)

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """The K-th."""
        return _at(scores, self.k, count)


@dataclass(frozen=True, kw_only=True)
class SampleMeanMax(Sampled):
    """tau is halfway between the sample's mean and its largest score."""

    name: ClassVar[str] = "sample-mean-max"

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """(mean + max) / 2."""
        mean = torch.where(torch.isneginf(scores), 0.0, scores).sum(-1) / count.clamp_min(1)
        return (mean + scores[..., 0]) / 2


@dataclass(frozen=True, kw_only=True)
class SampleGap(Sampled):
    """tau is the score above the widest gap in the upper half of the sorted sample."""

    name: ClassVar[str] = "sample-gap"

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """The score just above the widest gap."""
        if scores.shape[-1] < 2:
            return scores[..., 0]
        gaps = scores[..., :-1] - scores[..., 1:]
        place = torch.arange(gaps.shape[-1], device=gaps.device)
        gaps = torch.where(place < (count[..., None] // 2).clamp_min(1), gaps, -1.0)
        widest = gaps.nan_to_num(nan=-1.0, posinf=-1.0).argmax(-1)
        return _at(scores, widest + 1, count)


@dataclass(frozen=True, kw_only=True)
class SampleBudget(Sampled):
    """tau is the score that a share of the sample reaches."""

    name: ClassVar[str] = "sample-budget"
    fraction: float  # of the sample; changes results

    def check(self) -> None:
        """A share."""
        super().check()
        check_fraction(self.name, self.fraction)

    def argument(self) -> str:
        """The share."""
        return number(self.fraction)

    def estimate(self, scores: torch.Tensor, count: torch.Tensor) -> PerQueryHead:
        """The ceil(F * size)-th."""
        return _at(scores, (count.double() * self.fraction - 1e-9).ceil().long().clamp_min(1), count)
