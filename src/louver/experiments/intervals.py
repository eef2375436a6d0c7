"""Intervals around measured means: the bootstrap over samples, paired where two methods answered the same samples.

The percentile bootstrap (Efron, 1979): resample the samples with replacement, take the 2.5th and 97.5th percentile of the means. Where all
answers are right, or all wrong, it claims certainty that no finite number of samples gives, so an accuracy's interval is widened to
Wilson's (1927) where that is wider.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
_Z = 1.959964
WIDEST_VERDICT = 0.1  # an accuracy known no better than plus or minus this is no verdict


class Interval(NamedTuple):
    """A mean and the interval around it."""

    mean: float
    low: float
    high: float

    def fields(self, name: str) -> dict[str, float]:
        """As fields of a result row: name, name_low, name_high."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}

    @property
    def is_verdict(self) -> bool:
        """Whether the interval is no wider than +-10 points."""
        return self.high - self.low <= 2 * WIDEST_VERDICT + 1e-12


def bootstrap(values: Tensor, seed: int = 0) -> Interval:
    """Mean of values [num_samples] with its bootstrap interval. For a paired difference, give the differences."""
    values = values.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(seed)
    n = values.numel()
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    step = max(1, 2**22 // max(1, n))
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = torch.randint(n, (count, n), generator=generator)
        means[start : start + count] = values[drawn].mean(1)
    tail = (1 - LEVEL) / 2
    return Interval(values.mean().item(), means.quantile(tail).item(), means.quantile(1 - tail).item())


def accuracy(correct: Tensor, seed: int = 0) -> Interval:
    """Share of correct [num_samples] answers, the bootstrap's interval or Wilson's, whichever reaches further."""
    found = bootstrap(correct, seed)
    low, high = wilson(int(correct.sum()), correct.numel())
    return Interval(found.mean, min(found.low, low), max(found.high, high))


def wilson(num_correct: int, num_samples: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    n, share = num_samples, num_correct / num_samples
    center = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(0.0, center - reach), min(1.0, center + reach)
