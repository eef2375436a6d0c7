"""How long a token takes, the fair way: Louver, dense attention on the same buffers, and transformers' own cache in turn.

Every way decodes the same tokens from the same prompt, one step of each after another, so that whatever else the machine does
falls on all alike; nobody watches. ``sdpa`` is dense attention as transformers ships it: a DynamicCache, which copies all keys
and values at every step.
"""

import copy
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from louver.experiments.decoding import Decoded, decode
from louver.integrations.transformers.cache import keywords
from louver.integrations.transformers.layer import LouverLayer

WARM_UP = 1  # steps that are not counted


def as_shipped(model: Any, cache: Any) -> DynamicCache:
    """The tokens of a LouverCache in the cache transformers would have used."""
    shipped = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LouverLayer):
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None, "the cache holds the prompt"
            shipped.update(keys, values, i)
        else:
            shipped.layers[i] = copy.deepcopy(layer)
    return shipped


def in_turn(
    model: Any, caches: dict[str, Any], first: int, tokens: list[int], on_token: Callable[[int], None]
) -> dict[str, list[float]]:
    """Milliseconds of each step of each cache, decoding first and then tokens; the caches hold the prompt up to there."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for feed in [first, *tokens[:-1]]:
        for name, cache in caches.items():
            step: Decoded = decode(model, _Called(cache), feed, 1)
            times[name] += step.step_ms
        on_token(feed)
    return {name: ms[WARM_UP:] if len(ms) > WARM_UP else ms for name, ms in times.items()}


class _Called:
    """Any cache, with the ``kwargs`` of a LouverCache."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def kwargs(self) -> dict[str, Any]:
        return keywords(self._cache)
