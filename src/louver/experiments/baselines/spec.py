"""Baselines by name, as they stand on the command line: ``streaming:0.1``, ``quest:1024`` ...

A number is a budget: a share of the tokens up to 1, a number of tokens above. Twilight's is p, with an optional budget of its
base selection after a second colon (``twilight:0.95:0.25``).
"""

from collections.abc import Callable

from louver.errors import PolicyError
from louver.experiments.baselines.ann import KINDS, Ann
from louver.experiments.baselines.h2o import H2O
from louver.experiments.baselines.quest import Quest
from louver.experiments.baselines.selecting import Selecting
from louver.experiments.baselines.snapkv import SnapKV
from louver.experiments.baselines.streaming import StreamingLLM
from louver.experiments.baselines.twilight import Twilight

_BY_BUDGET: dict[str, Callable[..., Selecting]] = {
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "quest": Quest,
}
NAMES = (*_BY_BUDGET, "twilight", *KINDS)


def is_baseline(spec: str) -> bool:
    """Whether a specification names one of these baselines."""
    return spec.partition(":")[0] in NAMES


def served(spec: str, *, dense_layers: int = 0, reserve_tokens: int = 0) -> Callable[[int], Selecting]:
    """A factory layer_idx -> LayerAttention: ``LouverCache(model.config, layer=served("quest:0.1"))``.

    Args:
        spec: a name and its budget.
        dense_layers: this many first layers attend everything, as Quest's authors do with two (results).
        reserve_tokens: allocate this many tokens at once (speed only).

    Raises:
        PolicyError: the specification can't be read.
    """
    name, *arguments = spec.split(":")
    try:
        numbers = [float(x) for x in arguments]
    except ValueError:
        numbers = []
    if name not in NAMES or not 1 <= len(numbers) <= (2 if name == "twilight" else 1):
        raise PolicyError(f"{spec!r} can't be read; wanted NAME:BUDGET, the name one of {', '.join(NAMES)}")

    def make(layer_idx: int) -> Selecting:
        first, rest = (1.0, [1.0] * len(numbers[1:])) if layer_idx < dense_layers else (numbers[0], numbers[1:])
        if name in KINDS:
            return Ann(name, first, reserve_tokens=reserve_tokens)
        if name == "twilight":
            return Twilight(first, budget=rest[0] if rest else 1.0, reserve_tokens=reserve_tokens)
        return _BY_BUDGET[name](first, reserve_tokens=reserve_tokens)

    make(dense_layers)  # what is wrong is said now
    return make
