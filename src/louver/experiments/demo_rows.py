"""From what the demo measured to result rows, with the field names of docs/design.md."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from louver.experiments.audit import STAGES, Audit, LayerStep
from louver.experiments.decoding import Decoded, kl_nats
from louver.protocols import Policy


@dataclass(frozen=True, kw_only=True)
class Served:
    """A Louver run: ``free`` decoded on its own under the audit, ``along`` followed the dense tokens."""

    cache: Any  # the LouverCache after ``free``
    audit: Audit
    free: Decoded
    along: Decoded


def reference_row(facts: dict[str, Any], policy: str, step_ms: list[float]) -> dict[str, Any]:
    """The row of a dense way: ``dense`` on Louver's buffers, or ``sdpa`` on the cache transformers ships."""
    row = {
        "policy": policy,
        "index": "none",
        "bytes_fraction": 1.0,
        "num_tokens": len(step_ms),
        **_latency(step_ms),
    }
    return {**facts, **row, "guarantee": "exact"}


def louver_row(
    facts: dict[str, Any],
    policy: Policy,
    dense: Decoded,
    served: Served,
    times: dict[str, list[float]],
    truth: Served | None = None,
) -> dict[str, Any]:
    """The row of a Louver run; ``truth`` is the run that searched the same thresholds by reading every key.

    times: milliseconds per step of the ways that were timed in turn; a run that was not among them (``louver``) has its own.
    """
    free, memory = served.free, served.cache.memory()
    own = _latency(times.get("louver", free.step_ms))
    kl = kl_nats(dense.logits, served.along.logits)
    kv_itemsize = getattr(torch, facts["dtype"]).itemsize
    flat = {} if truth is None else {"num_equal_tokens_flat": _num_equal(truth.free, free)}
    return {
        **facts,
        "policy": policy.spec,
        **_evidence(policy, served.audit.steps),
        "num_tokens": len(free.tokens),
        "num_equal_tokens": _num_equal(dense, free),
        **flat,
        "first_divergence": _first_divergence(dense, free),
        "top1_agreement": _mean(torch.tensor(dense.tokens) == torch.tensor(served.along.tokens)),
        "kl_nats": _mean(kl),
        "kl_nats_max": float(kl.max()),
        **own,
        **{
            f"latency_vs_{name}": own["latency_us_p50"] / _latency(ms)["latency_us_p50"]
            for name, ms in times.items()
            if name != "louver"
        },
        "keys_values_bytes": memory["keys_values"],
        "index_bytes": memory["index"],
        "index_memory_fraction": memory["index"] / memory["keys_values"],
        "index_memory_fraction_16bit": memory["index"] * kv_itemsize / (2 * memory["keys_values"]),
        "guarantee": policy.guarantee,
    }


def layer_rows(policy: Policy, audit: Audit) -> list[dict[str, Any]]:
    """One row per served layer."""
    layers = sorted({step.layer for step in audit.steps})
    return [{"layer": i, **_evidence(policy, [s for s in audit.steps if s.layer == i])} for i in layers]


def step_rows(tokenizer: Any, dense: Decoded, served: Served) -> list[dict[str, Any]]:
    """One row per decoded token. ``dense_margin`` is how far dense attention's best logit is ahead of its second."""
    audit, free, along = served.audit, served.free, served.along
    kl = kl_nats(dense.logits, along.logits)
    num_steps = len(dense.tokens)
    per_step = len(audit.steps) // num_steps
    best = dense.logits.topk(2, dim=-1).values
    rows = []
    for i in range(num_steps):
        layers = audit.steps[i * per_step : (i + 1) * per_step]
        rows.append(
            {
                "step": i,
                "dense_token": dense.tokens[i],
                "louver_token": free.tokens[i],
                "louver_token_on_dense_path": along.tokens[i],
                "dense_text": tokenizer.decode([dense.tokens[i]]),
                "louver_text": tokenizer.decode([free.tokens[i]]),
                "kl_nats": float(kl[i]),
                "dense_margin": float(best[i, 0] - best[i, 1]),
                "recall": _recall(layers),
                "output_error": _mean(torch.cat([s.output_error.flatten() for s in layers])),
                "bytes_fraction": sum(s.bytes_read for s in layers) / sum(s.bytes_dense for s in layers),
                "dense_latency_us": 1e3 * dense.step_ms[i],
                "latency_us": 1e3 * free.step_ms[i],
            }
        )
    return rows


def _evidence(policy: Policy, steps: list[LayerStep]) -> dict[str, Any]:
    """What was read, what was certified and what was true, over layers, steps and heads."""
    counts = {name: sum(s.counts[name] for s in steps) for name in STAGES}
    error = torch.cat([s.output_error.flatten() for s in steps])
    bound = torch.cat([s.output_error_bound.flatten() for s in steps])
    return {
        "exact_fraction": counts["exact"] / counts["keys"],
        "coarse_fraction": counts["coarse"] / counts["keys"],
        "unread_fraction": 0.0 if policy.drops else counts["unread"] / counts["keys"],
        "scanned_fraction": counts["scanned"] / counts["keys"],
        "bytes_fraction": sum(s.bytes_read for s in steps) / sum(s.bytes_dense for s in steps),
        "recall": _recall(steps),
        "num_relevant": sum(s.num_relevant for s in steps),
        "num_false_negatives": sum(s.num_false_negatives for s in steps),
        "dropped_mass": _mean(torch.cat([s.dropped_mass.flatten() for s in steps])),
        "dropped_mass_bound": _mean(torch.cat([s.dropped_mass_bound.flatten() for s in steps])),
        "output_error": _mean(error),
        "output_error_p50": float(error.median()),
        "output_error_p99": float(error.quantile(0.99)),
        "output_error_bound": _mean(bound),
        "output_error_bound_p50": float(bound.median()),
        "arithmetic_bound": _mean(torch.cat([s.arithmetic_bound.flatten() for s in steps])),
        "num_bound_violations": sum(s.num_bound_violations for s in steps),
        "num_checked": error.numel(),
    }


def _recall(steps: list[LayerStep]) -> float:
    """Of the keys whose true score reaches tau, the share treated exactly; 1 where there are none."""
    relevant = sum(s.num_relevant for s in steps)
    return 1.0 - sum(s.num_false_negatives for s in steps) / relevant if relevant else 1.0


def _num_equal(one: Decoded, other: Decoded) -> int:
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))


def _first_divergence(dense: Decoded, free: Decoded) -> int | None:
    pairs = zip(dense.tokens, free.tokens, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def _latency(step_ms: list[float]) -> dict[str, float]:
    """Microseconds per token of the whole model."""
    times = torch.tensor(step_ms, dtype=torch.float64) * 1e3
    return {f"latency_us_p{p}": float(times.quantile(p / 100)) for p in (20, 50, 80)}


def _mean(x: Tensor) -> float:
    return float(x.double().mean())
