"""The vocabulary of shapes, and the checks made once at the public doors.

Axes are named ``batch, num_q_heads, num_kv_heads, kv_len, head_dim`` throughout; group_size = num_q_heads // num_kv_heads.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import NonFiniteError, ShapeError

Query = Float[Tensor, "batch num_q_heads head_dim"]
Keys = Float[Tensor, "batch num_kv_heads kv_len head_dim"]
Values = Float[Tensor, "batch num_kv_heads kv_len head_dim"]
Cache = Float[Tensor, "rows num_kv_heads tokens head_dim"]  # keys or values: rows of a batch, or pages of a block table
PerQueryHead = Float[Tensor, "batch num_q_heads"]
PerRow = Int[Tensor, " batch"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. The sum says it in one op, except where it overflows."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def check_query(q: Tensor, keys: Tensor, is_finite: Callable[[Tensor], bool] = is_finite) -> None:
    """Raise a ShapeError or NonFiniteError unless q [batch, num_q_heads, head_dim] can ask about keys."""
    if q.dim() != 3:
        raise ShapeError(
            f"q has shape {tuple(q.shape)}; wanted [batch, num_q_heads, head_dim], one query token per row and head"
        )
    check_same_device(q=q, keys=keys)
    if q.dtype not in DTYPES:
        raise ShapeError(f"q has dtype {q.dtype}; wanted float32, float16 or bfloat16")
    if q.shape[0] != keys.shape[0]:
        raise ShapeError(f"q has batch={q.shape[0]} but the keys have batch={keys.shape[0]}")
    if q.shape[2] != keys.shape[3]:
        raise ShapeError(f"q has head_dim={q.shape[2]} but the keys have head_dim={keys.shape[3]}")
    if not keys.shape[1] or not q.shape[1] or not q.shape[2]:
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and the keys {tuple(keys.shape)}; wanted at least one head and channel"
        )
    if q.shape[1] % keys.shape[1]:
        raise ShapeError(
            f"num_q_heads={q.shape[1]} is not a multiple of num_kv_heads={keys.shape[1]}; "
            "did you pass [batch, len, heads, dim] instead of [batch, heads, len, dim]?"
        )
    # On a GPU the answer would make the host wait at every step; the kernels treat every key of such a query exactly.
    if not q.is_cuda and not is_finite(q):
        raise NonFiniteError("q holds NaN or infinity; a query that is not finite has no bounds")


def check_keys_values(keys: Tensor, values: Tensor | None = None) -> None:
    """Raise a ShapeError unless keys (and values) are [batch, num_kv_heads, kv_len, head_dim] of one supported dtype."""
    for name, x in (("keys", keys), ("values", values)):
        if x is None:
            continue
        if x.dim() != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; wanted [batch, num_kv_heads, kv_len, head_dim]")
        if x.dtype not in DTYPES:
            raise ShapeError(f"{name} has dtype {x.dtype}; wanted float32, float16 or bfloat16")
    if values is not None:
        check_same_device(keys=keys, values=values)
        if keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}; batch, heads and length must agree"
            )
        if keys.shape[3] != values.shape[3]:
            raise ShapeError(
                f"keys have head_dim={keys.shape[3]} and values {values.shape[3]}; "
                "a different width for values (as in MLA) is not supported"
            )


def check_tau(tau: Tensor, q: Tensor) -> None:
    """Raise unless tau is [batch, num_q_heads] on q's device and free of NaN. Infinite thresholds are allowed."""
    if tau.shape != q.shape[:2]:
        raise ShapeError(f"tau has shape {tuple(tau.shape)}; wanted [batch, num_q_heads] = {tuple(q.shape[:2])}")
    check_same_device(tau=tau, q=q)
    if torch.isnan(tau).any():
        raise NonFiniteError("tau is NaN; every comparison with it would be false and every key lost")


def check_scale(softmax_scale: float) -> None:
    """Raise a ShapeError unless the scale is finite and above 0: bounds of scores would not be bounds of logits."""
    if not 0 < softmax_scale < math.inf:
        raise ShapeError(f"softmax_scale={softmax_scale}; wanted a finite number above 0")


def check_same_device(**tensors: Tensor) -> None:
    """Raise a ShapeError unless all tensors live on one device."""
    devices = [x.device for x in tensors.values()]
    if devices.count(devices[0]) < len(devices):
        raise ShapeError("tensors on different devices: " + ", ".join(f"{n} on {x.device}" for n, x in tensors.items()))


def group_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """View [batch, num_q_heads, ...] as [batch, num_kv_heads, group_size, ...]."""
    return x.unflatten(1, (num_kv_heads, x.shape[1] // num_kv_heads))
