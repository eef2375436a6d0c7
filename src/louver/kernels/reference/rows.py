"""Row coordinates: left padding taken away, so that index i of every row is its i-th valid token."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.kernels.reference.product import matmul


def row_lengths(kv_start: Int[Tensor, " batch"], kv_len: Int[Tensor, " batch"]) -> tuple[Int[Tensor, " batch"], int]:
    """Valid tokens per row, and the longest row."""
    length = (kv_len - kv_start).clamp_min(0)
    return length, int(length.max()) if length.numel() else 0


def valid_rows(length: Int[Tensor, " batch"], longest: int) -> Bool[Tensor, "batch 1 longest"]:
    """True where a row has a token."""
    return (torch.arange(longest, device=length.device) < length[:, None])[:, None]


def to_rows(
    x: Float[Tensor, "batch heads kv_len dims"],
    kv_start: Int[Tensor, " batch"],
    length: Int[Tensor, " batch"],
    longest: int,
) -> Float[Tensor, "batch heads longest dims"]:
    """x in row coordinates, zero past a row's end; a view where no row is padded."""
    if not kv_start.any() and (length == longest).all():
        return x[:, :, :longest]
    index = (kv_start[:, None] + torch.arange(longest, device=x.device)).clamp_max(max(0, x.shape[2] - 1))
    gathered = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]).long())
    return torch.where(valid_rows(length, longest)[..., None], gathered, 0.0)


def to_tokens(
    mask: Bool[Tensor, "batch heads longest"], kv_start: Int[Tensor, " batch"], kv_len: int
) -> Bool[Tensor, "batch heads kv_len"]:
    """A mask in row coordinates, laid over token positions."""
    out = mask.new_zeros(*mask.shape[:2], kv_len)
    for row, start in enumerate(kv_start.tolist()):
        width = max(0, min(mask.shape[2], kv_len - start))
        out[row, :, start : start + width] = mask[row, :, :width]
    return out


def exact_scores(
    q: Float[Tensor, "batch num_q_heads head_dim"], keys: Float[Tensor, "batch num_kv_heads longest head_dim"]
) -> tuple[Float[Tensor, "batch num_q_heads longest"], Float[Tensor, "batch num_q_heads longest"]]:
    """Scores in float32, and the dot products of absolute values that bound their rounding."""
    grouped = q.float().unflatten(1, (keys.shape[1], -1))
    k = keys.float().transpose(-1, -2)
    return matmul(grouped, k).flatten(1, 2), matmul(grouped.abs(), k.abs()).flatten(1, 2)
