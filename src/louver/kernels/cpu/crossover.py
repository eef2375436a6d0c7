"""Where the dense kernel is the faster step: a sketch costs a few microseconds per head that a short cache cannot win back."""

import math

from louver.kernels import crossover
from louver.kernels.cpu import native
from louver.shapes import Keys, PerRow

# Tokens up to which dense is faster: FIXED / (bytes of one key - SKETCHED), as measured (docs/kernels.md). A step through the sketch has
# fixed work to pay, and saves of each key what it is wider than its own share of the sketch's arithmetic.
FIXED = 170_000
SKETCHED = 85
# With AVX-512 the dense kernel takes half of the time that it took when FIXED was measured.
FIXED_AVX512 = 340_000
# With AVX2 the dense kernel, 16 bits wide or 32, is bound by arithmetic: a step through the sketch saves most of it, whatever is kept.
FIXED_AVX2 = 250_000


def most_tokens(head_dim: int, element_size: int) -> float:
    """Tokens of a row up to which the dense kernel is no slower; infinite for keys too narrow to save anything."""
    instructions = native.instruction_set()
    if instructions == "avx2":
        return FIXED_AVX2 / (head_dim * element_size)
    fixed, saved = FIXED_AVX512 if instructions.startswith("avx512") else FIXED, head_dim * element_size - SKETCHED
    return fixed / saved if saved > 0 else math.inf


def is_short(keys: Keys, kv_start: PerRow, kv_len: PerRow) -> bool:
    """Whether a step over rows kv_start .. kv_len of keys (and as many values) is faster densely, rows taken together."""
    if not crossover.enabled:
        return False
    batch, _, tokens, head_dim = keys.shape
    most = most_tokens(head_dim, keys.element_size())
    if tokens <= most:  # without asking how long each row is
        return True
    return batch > 1 and int((kv_len - kv_start).sum()) <= most * batch
