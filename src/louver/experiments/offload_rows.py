"""What the rows of the offload experiment have in common, on whatever device they were measured."""

from typing import Any

import torch
from torch import Tensor

from louver.experiments.synthetic import Synthetic
from louver.protocols import AttendResult, Guarantee, StepStats
from louver.shapes import group_heads


def facts(data: Synthetic, *, index: str, policy: str, store: str, guarantee: Guarantee) -> dict[str, Any]:
    """The fields that say what was measured."""
    return {
        "kv_len": data.keys.shape[2],
        "batch": data.keys.shape[0],
        "num_q_heads": data.q.shape[1],
        "num_kv_heads": data.keys.shape[1],
        "head_dim": data.keys.shape[3],
        "dtype": str(data.keys.dtype).removeprefix("torch."),
        "data": "heavy_tailed",
        "device": torch.cuda.get_device_name() if data.keys.is_cuda else "cpu",
        "index": index,
        "policy": policy,
        "store": store,
        "guarantee": guarantee,
    }


def moved_bytes(stats: StepStats, dtype: torch.dtype) -> int:
    """Bytes of exact keys and values, of a dtype, that a step asks the store for."""
    row = dtype.itemsize * stats.head_dim
    return row * int((stats.num_scanned + stats.num_exact).sum())


def evidence(data: Synthetic, result: AttendResult) -> dict[str, Any]:
    """Recall over all keys and true error of a step, against float64, head by head to bound memory."""
    assert result.exact_mask is not None
    num_kv_heads, scale = data.keys.shape[1], data.keys.shape[3] ** -0.5
    relevant = missed = violations = 0
    errors = []
    for head in range(num_kv_heads):
        q = group_heads(data.q, num_kv_heads)[:, head].double()
        scores = torch.cat([q @ part.double().mT for part in data.keys[:, head].split(65536, 1)], -1)
        weights = torch.softmax(scores * scale, -1)
        parts = zip(weights.split(65536, -1), data.values[:, head].split(65536, 1), strict=True)
        truth = sum((w @ v.double() for w, v in parts), torch.zeros_like(q))
        mine = [group_heads(x, num_kv_heads)[:, head] for x in (result.tau, result.exact_mask, result.out)]
        reaches = scores >= mine[0].double()[..., None]
        relevant += int(reaches.sum())
        missed += int((reaches & ~mine[1]).sum())
        error = (truth - mine[2].double()).norm(dim=-1)
        bound = group_heads(result.certificate.double() + result.arithmetic_bound, num_kv_heads)[:, head]
        violations += int((error > bound).sum())
        errors.append(error / truth.norm(dim=-1))
    relative = torch.stack(errors).flatten()
    return {
        "recall": 1 - missed / max(1, relevant),
        "num_false_negatives": missed,
        "output_error": float(relative.mean()),
        "output_error_p99": float(relative.quantile(0.99)),
        "num_bound_violations": violations,
    }


def timing(microseconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    times = torch.tensor(microseconds, dtype=torch.float64)
    return {f"latency_us{name}": float(times.quantile(p)) for name, p in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))}


def cache_bytes(data: Synthetic) -> int:
    """Bytes of the keys and values."""
    return 2 * data.keys.numel() * data.keys.element_size()


def dense_output(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's attention of q [batch, num_q_heads, head_dim]."""
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
