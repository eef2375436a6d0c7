"""A step on a card beside float64 attention over all of its keys: what it found, how far it is off, and what it certified."""

import torch
from torch import Tensor

from louver.attention.asked import num_asked_violations
from louver.kernels.ops import TierOutput
from louver.policies.spec import parse

KEYS = 65536  # in float64 at once


def check(
    q: Tensor, keys: Tensor, values: Tensor, fast: TierOutput, recorded: TierOutput, scale: float, spec: str
) -> dict:
    """Recall over all keys, true error and certificate of a step, against float64; KV head by KV head to bound memory.

    fast: the step as it was timed. recorded: the same with its mask of exact keys, which says what was found.
    """
    group = q.shape[1] // keys.shape[1]
    policy = parse(spec)
    rule, drops = policy.rule(), policy.drops
    assert recorded.exact_mask is not None
    counted: list[Tensor] = []  # keys lost, relevant, found; of every KV head
    figures: list[Tensor] = []  # of every query head: selected, error, bound, dropped, bound
    for row in range(q.shape[0]):
        for kv in range(keys.shape[1]):
            heads = slice(kv * group, (kv + 1) * group)
            scores = torch.cat([q[row, heads].double() @ k.double().mT for k in keys[row, kv].split(KEYS)], 1)
            weights = torch.softmax(scores * scale, 1)
            want = torch.zeros_like(q[row, heads], dtype=torch.float64)
            for w, v in zip(weights.split(KEYS, 1), values[row, kv].split(KEYS), strict=True):
                want += w @ v.double()
            dense = (fast.tau[row, heads] == -torch.inf)[:, None]  # the step went dense; recording takes the long way
            exact = recorded.exact_mask[row, heads] | dense
            tau = torch.where(dense, -torch.inf, recorded.tau[row, heads, None].double())
            relevant = scores >= tau
            lost = (relevant & ~exact).sum()
            if rule is not None and drops and rule.tau is None:
                need = max(rule.count, -int(-(rule.share * keys.shape[2] - 1e-6) // 1), 1)
                relevant = scores >= scores.topk(need).values[:, -1:]
            counted.append(torch.stack([lost, relevant.sum(), (relevant & exact).sum()]))
            size = want.norm(dim=1)
            error = (fast.out[row, heads].double() - want).norm(dim=1) / size
            bound = (fast.certificate + fast.arithmetic_bound)[row, heads] / size
            dropped = (weights * ~exact).sum(1) if drops else torch.zeros_like(size)
            figures.append(
                torch.stack(
                    [exact.double().mean(1), error, bound, dropped, fast.dropped_mass_bound[row, heads].double()]
                )
            )
    lost, asked, found = torch.stack(counted).sum(0).tolist()
    selected, errors, bounds, dropped, dropped_bounds = torch.cat(figures, 1).cpu()
    return {
        "recall": found / max(1, asked),
        "num_false_negatives": lost + asked - found,
        "selected_fraction": float(selected.mean()),
        "output_error": float(errors.mean()),
        "output_error_p99": float(errors.quantile(0.99, interpolation="higher")),
        "output_error_bound": float(bounds.quantile(0.5, interpolation="higher")),
        "dropped_mass": float(dropped.mean()),
        "dropped_mass_bound": float(dropped_bounds.mean()),
        "num_bound_violations": int((errors > bounds).sum() + (dropped > dropped_bounds + 1e-6).sum()),
        "num_asked_violations": num_asked_violations(policy, fast),
        "guarantee": policy.guarantee,
        "counts": fast.counts,
    }
