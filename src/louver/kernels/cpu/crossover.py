"""Where the dense kernel is the faster step: a sketch costs a few microseconds per head that a short cache cannot win back.

Speed only: a dense step keeps every key exactly, and its counts say so. ``LOUVER_CROSSOVER=off`` sends every step through the
sketch, which is what tests of its machinery want.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from louver.shapes import Keys, PerRow

# Bytes of keys and values per row up to which dense is faster (one thread of an AVX-512 server, docs/kernels.md).
BYTES = {"drop": 3 << 19, "keep": 2 << 20}

enabled = os.environ.get("LOUVER_CROSSOVER", "on") != "off"


def is_short(keys: Keys, kv_start: PerRow, kv_len: PerRow, drops: bool) -> bool:
    """Whether a step over rows kv_start .. kv_len of keys (and as many values) is faster densely, rows taken together."""
    batch, num_kv_heads, tokens, head_dim = keys.shape
    per_token = 2 * num_kv_heads * head_dim * keys.element_size()
    most = BYTES["drop" if drops else "keep"] * batch // per_token
    if not enabled:
        return False
    if tokens * batch <= most:  # without asking how long each row is
        return True
    return batch > 1 and int((kv_len - kv_start).sum()) <= most


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Dispatch on or off for a while: off where a policy is to be judged, since below the crossover none is followed."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before
