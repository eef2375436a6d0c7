"""Brute force beside a decode step, for a user or a test who wants to see it: every key scored in float64.

It knows nothing of bounds. A false negative is a key whose true score reaches the step's tau and that was not attended exactly; a
bound violation is an output further from the truth than certificate + arithmetic_bound.
"""

import torch

from louver.attention import PagedRows
from louver.integrations.vllm.totals import Totals
from louver.protocols import AttendResult
from louver.shapes import Cache, Query, group_heads


def audit(
    totals: Totals, result: AttendResult, q: Query, keys: Cache, values: Cache, rows: PagedRows, softmax_scale: float
) -> None:
    """Check one layer's decode step, recorded with exact_mask, and count what is found."""
    assert result.exact_mask is not None, "a step under audit is recorded"
    num_kv_heads = keys.shape[1]
    for i, length in enumerate(rows.kv_len.tolist()):
        table = rows.block_table[i, : -(-length // keys.shape[2])].long()
        k, v = (x[table].transpose(0, 1).flatten(1, 2)[:, :length].double() for x in (keys, values))
        query = group_heads(q[i : i + 1].double(), num_kv_heads)[0]
        scores = (query @ k.mT).flatten(0, 1)  # num_q_heads length
        weights = torch.softmax(scores * softmax_scale, -1).unflatten(0, query.shape[:2])
        truth = (weights @ v).flatten(0, 1)
        relevant = scores >= result.tau[i].double()[:, None]
        error = (truth - result.out[i].double()).norm(dim=-1)
        bound = result.certificate[i].double() + result.arithmetic_bound[i].double()
        totals.num_decisions += scores.numel()
        totals.num_relevant += int(relevant.sum())
        totals.num_false_negatives += int((relevant & ~result.exact_mask[i, :, :length]).sum())
        totals.num_bound_violations += int((~(error <= bound)).sum())
