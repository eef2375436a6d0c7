"""What a byte buys in every head: error against bytes of a grid of policies, and the choice for one price of a byte.

Heads differ. Where attention is sharp a few exact keys settle the output; where it is diffuse the sketch's errors cancel and more exact
keys buy nothing. Each head of each layer is measured alone, on queries of a prompt, and takes the policy with the least

    error + price * bytes / dense bytes

for a price that all heads of a model share. That spends one budget over all of them where it lowers the mean error most: no head could
give a byte to another and lower the sum. A choice is made for speed and error; what each policy certifies holds whatever is chosen.
Cost: every policy of the grid attends every fitting query of a layer once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from louver.attention import attend
from louver.errors import PolicyError
from louver.experiments.capture import Capture, Layer
from louver.experiments.truth import attention, sketch_of
from louver.kernels import crossover
from louver.policies import parse
from louver.protocols import Guarantee

_SHARES = ("0.0005", "0.001", "0.002", "0.003", "0.005", "0.008", "0.012", "0.02", "0.05", "0.2")
_UNREAD = ("0.02", "0.05", "0.1", "0.2", "0.35", "0.6")
GRID = tuple(f"exact:{share}+unread:{mass}" for share in _SHARES for mass in _UNREAD)
QUERIES = 16  # of those that may fit something, evenly spread


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Mean error and bytes of each policy in every KV head of one layer."""

    policies: tuple[str, ...]
    error: Float[Tensor, "policies num_kv_heads"]  # the mean of the group's query heads
    bytes_fraction: Float[Tensor, "policies num_kv_heads"]

    def at(self, price: float, by_head: bool = True) -> str:
        """The cheapest choice at a price: a specification for the layer, ``A/B/C`` where its heads differ."""
        cost = self.error + price * self.bytes_fraction
        if not by_head:
            return self.policies[int(cost.mean(1).argmin())]
        return joined([self.policies[i] for i in cost.argmin(0).tolist()])


def joined(specs: Sequence[str]) -> str:
    """One specification for heads in order: the one they share, or ``A/B/C``."""
    return specs[0] if len(set(specs)) == 1 else "/".join(specs)


def curves(
    capture: Capture,
    layer: Layer,
    backend: str,
    policies: Sequence[str] | None = None,
    num_queries: int = QUERIES,
    projection: Float[Tensor, "hidden channels"] | None = None,
) -> Curves:
    """Measure a layer on queries that may fit something; by default the policies of GRID.

    projection: the output projection's weight. With it a head's error is what it moves the layer's output by, relative to that output;
    without, the error of the head's own output relative to its norm.

    Raises:
        PolicyError: a policy can't be read.
    """
    policies = GRID if policies is None else policies
    chosen = [parse(spec) for spec in policies]
    index, (num_kv_heads, _, head_dim) = sketch_of(capture, layer, backend), layer.keys.shape
    places = torch.linspace(0, capture.fitting().stop - 1, min(num_queries, capture.fitting().stop)).round().long()
    weight = None if projection is None else projection.double().unflatten(1, (-1, head_dim)).transpose(0, 1)
    error = torch.zeros(len(chosen), num_kv_heads, dtype=torch.float64)
    spent = torch.zeros_like(error)
    with crossover.switched(False):  # a policy is judged however short the cache
        for place in places.tolist():
            position, q = int(capture.query_positions[place]), layer.queries[:, place].float()
            keys, values = (x[:, : position + 1].double() for x in (layer.keys, layer.values))
            truth, here = attention(q, keys, values, capture.softmax_scale)[1], index.prefix(position + 1)
            for i, policy in enumerate(chosen):
                result = attend(q[None], here, policy=policy, softmax_scale=capture.softmax_scale, keep_best=True)
                off = result.out[0].double() - truth
                error[i] += _relative(off, truth, weight).unflatten(0, (num_kv_heads, -1)).mean(1)
                spent[i] += (result.stats.bytes_read / result.stats.bytes_dense)[0]
    return Curves(policies=tuple(policies), error=error / len(places), bytes_fraction=spent / len(places))


def _relative(off: Tensor, truth: Tensor, weight: Tensor | None) -> Tensor:
    """Errors [num_q_heads] of outputs [num_q_heads, head_dim]; weight [num_q_heads, hidden, head_dim] of the output projection."""
    if weight is None:
        return off.norm(dim=-1) / truth.norm(dim=-1)
    moved = torch.einsum("hod,hd->ho", weight, off).norm(dim=-1)
    return moved / torch.einsum("hod,hd->o", weight, truth).norm()


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """``fit:PRICE``: every head's own choice, from queries of the same text; ``fit-layers:PRICE``: every layer's."""

    guarantee: ClassVar[Guarantee] = "certified"  # as every policy of GRID
    price: float
    by_head: bool = True

    def __post_init__(self) -> None:
        if not self.price > 0:
            raise PolicyError(f"{self.spec!r} has no price for a byte; wanted a number above 0")

    @property
    def spec(self) -> str:
        """The specification."""
        return f"{'fit' if self.by_head else 'fit-layers'}:{self.price:g}"
