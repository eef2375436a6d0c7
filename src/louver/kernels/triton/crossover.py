"""Where dense attention is the faster step on a card: a sketch costs a chain of launches that small work cannot win back.

Both times are sums of five terms, fitted to rows of one H100 (benchmarks/results/crossover_h100.json, by scripts/crossover.py). What counts
is the work of the whole batch: eight rows of 4,096 tokens gain what one of 32,768 does. Speed only.
"""

from typing import NamedTuple

from torch import Tensor

from louver.kernels import crossover as dispatch
from louver.kernels.triton import runtime


class Costs(NamedTuple):
    """Microseconds of a step."""

    start: float
    group: float  # per query head of a KV head
    head: float  # per query head of the batch
    channel: float  # per channel of a key, of all keys of the batch
    pair: float  # per key and query head


DENSE = Costs(start=12.2, group=0.0, head=0.00161, channel=1.43e-6, pair=9.48e-7)
STEPS = {
    "drop": Costs(start=21.0, group=1.44, head=0.0231, channel=3.04e-7, pair=0.0),
    "keep": Costs(start=21.3, group=1.66, head=0.0213, channel=5.06e-7, pair=0.0),
    "looks": Costs(start=20.4, group=5.09, head=0.0246, channel=1.53e-7, pair=4.89e-6),
}
MARGIN = 0.9  # of the dense time, for a step that is taken in its place: no measured shape is then slower than the best dense kernel
SHORTEST = 1024  # tokens of a row up to which it is dense in any case: eight blocks don't fill a program


def microseconds(costs: Costs, rows: int, tokens: int, group: int, head_dim: int) -> float:
    """A step over rows = batch * num_kv_heads of so many tokens, with ``group`` query heads to a KV head."""
    keys = rows * tokens
    terms = (1, group, rows * group, keys * head_dim, keys * group)
    return sum(cost * term for cost, term in zip(costs, terms, strict=True))


def is_short(kind: str, rows: int, tokens: int, group: int, head_dim: int) -> bool:
    """Whether dense is faster than a step of this kind: ``drop``, ``keep`` or ``looks`` (several looks at scores)."""
    shape = (rows, tokens, group, head_dim)
    return tokens <= SHORTEST or microseconds(STEPS[kind], *shape) >= MARGIN * microseconds(DENSE, *shape)


def dense_is_faster(kind: str, q: Tensor, keys: Tensor, longest: int) -> bool:
    """Whether a step over rows of up to ``longest`` tokens is dispatched to dense attention."""
    num_kv_heads = keys.shape[1]
    if not dispatch.enabled or not is_short(
        kind, q.shape[0] * num_kv_heads, longest, q.shape[1] // num_kv_heads, q.shape[2]
    ):
        return False
    return not (keys.is_cuda and runtime.in_host_memory(keys))  # the bus makes dense slow at any length
