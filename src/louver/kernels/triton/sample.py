"""sample_scores: exact scores of a uniform random sample of each row's keys, without a hash per token in every step.

Which keys are sampled depends on the tags of the positions alone (kernels/reference/sample.py). So the positions are sorted by their tags
once per capacity and seed, and a row's sample is the first ``size`` of them that it holds.
"""

# pyright: reportCallIssue=false
# Constexprs and launch options are no parameters to a type checker.

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from louver.kernels.reference.sample import tags
from louver.kernels.triton.common import token_offset
from louver.kernels.triton.launch import buffers, cache_arguments, workspace
from louver.protocols import Sample
from louver.shapes import Cache, PerRow, Query

CHUNK = 512  # positions of the order looked at together
_orders: dict[
    tuple[torch.device, int, int], Tensor
] = {}  # a graph may hold one, so none is given back; capacities are powers of two


def sample_scores(
    q: Query,
    keys: Cache,
    kv_start: PerRow,
    kv_len: PerRow,
    sample: Sample,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> Float[Tensor, "batch num_q_heads size"]:
    """Scores (float32) of the sampled keys; NaN where a row has fewer than ``size``. The same keys as the reference's, in tag order."""
    batch, num_q_heads, head_dim = q.shape
    rows = batch * keys.shape[1]
    longest = keys.shape[2] * (1 if block_table is None else block_table.shape[1])
    order = _order(q.device, 1 << max(longest - 1, 0).bit_length(), sample.seed)
    chosen = buffers(workspace, q.device, "sampled", (batch, sample.size), torch.int32)
    scores = torch.empty(batch, num_q_heads, sample.size, dtype=torch.float32, device=q.device)
    x = q.contiguous()
    choose_kernel[(batch,)](order, chosen, kv_start, kv_len, order.numel(), sample.size, CHUNK=CHUNK, num_warps=4)
    score_kernel[(rows, triton.cdiv(sample.size, 32))](
        x, *cache_arguments(keys, keys, block_table), chosen, scores, kv_start, keys.shape[1], sample.size,
        G=num_q_heads // keys.shape[1], D=head_dim, DP=triton.next_power_of_2(head_dim), BLOCK=32,
        PAGED=block_table is not None, num_warps=4,
    )  # fmt: skip
    return scores


def _order(device: torch.device, capacity: int, seed: int) -> Tensor:
    """Positions below the capacity by ascending tag, int32."""
    key = (device, capacity, seed)
    if key in _orders:
        return _orders[key]
    order = tags(torch.arange(capacity, device=device), seed).argsort().to(torch.int32)
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _orders[key] = order  # a graph that is captured before any step sorts anew in every replay
    return order


@triton.jit
def choose_kernel(order, chosen, kv_start, kv_len, capacity, size, CHUNK: tl.constexpr):
    """The first ``size`` positions of the order that a row holds; -1 for those that it lacks."""
    row = tl.program_id(0)
    length = tl.load(kv_len + row) - tl.load(kv_start + row)
    lane = tl.arange(0, CHUNK)
    found = 0
    i = 0
    while (found < size) & (i < capacity):
        position = tl.load(order + i + lane, mask=i + lane < capacity, other=2147483647)
        held = (position < length).to(tl.int32)
        place = found + tl.cumsum(held, 0) - held
        tl.store(chosen + row * size + place, position, mask=(held > 0) & (place < size))
        found += tl.sum(held, 0)
        i += CHUNK
    for i in range(0, size, CHUNK):
        tl.store(chosen + row * size + i + lane, -1, mask=(i + lane >= found) & (i + lane < size))


@triton.jit
def score_kernel(
    q, k, v, table, k_page, k_head, k_token, k_dim, v_page, v_head, v_token, v_dim, table_stride, page_len,
    chosen, scores, kv_start, num_kv_heads, size,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // num_kv_heads
    d = tl.arange(0, DP)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(chosen + row * size + index, mask=index < size, other=-1)
    token = tl.load(kv_start + row) + tl.maximum(position, 0)
    at = token_offset(table, row, pid % num_kv_heads, token, k_page, k_head, k_token, table_stride, page_len, PAGED)
    key = tl.load(k + at[:, None] + d[None, :] * k_dim, mask=(position >= 0)[:, None] & (d < D)[None, :], other=0.0)
    for g in tl.static_range(G):
        x = tl.load(q + (pid * G + g) * D + d, mask=d < D, other=0.0).to(tl.float32)
        score = tl.sum(key.to(tl.float32) * x[None, :], 1)
        score = tl.where(position >= 0, score, float("nan"))
        tl.store(scores + (pid * G + g).to(tl.int64) * size + index, score, mask=index < size)
