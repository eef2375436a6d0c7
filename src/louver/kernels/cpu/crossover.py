"""Where the dense kernel is the faster step: a sketch costs a few microseconds per head that a short cache cannot win back."""

from louver.kernels import crossover
from louver.shapes import Keys, PerRow

# Bytes of keys and values per row up to which dense is faster (one thread of an AVX-512 server, docs/kernels.md).
BYTES = {"drop": 3 << 19, "keep": 2 << 20}


def is_short(keys: Keys, kv_start: PerRow, kv_len: PerRow, drops: bool) -> bool:
    """Whether a step over rows kv_start .. kv_len of keys (and as many values) is faster densely, rows taken together."""
    if not crossover.enabled:
        return False
    batch, num_kv_heads, tokens, head_dim = keys.shape
    per_token = 2 * num_kv_heads * head_dim * keys.element_size()
    most = BYTES["drop" if drops else "keep"] * batch // per_token
    if tokens * batch <= most:  # without asking how long each row is
        return True
    return batch > 1 and int((kv_len - kv_start).sum()) <= most
