"""Heads with policies of their own get, bit for bit, what a step under each policy gives them."""

import pytest
import torch

from helpers import build_case
from louver import attend
from louver.attention.heads import head_rules
from louver.kernels import available_backends
from louver.policies import parse

fused = pytest.mark.parametrize("backend", available_backends())


@fused
@pytest.mark.parametrize("specs", [("exact:0.02", "exact:0.3", "exact:0.3"), ("topk:4", "budget:0.2", "topk:9")])
def test_parts_are_the_steps_they_stand_for(backend, specs):
    case = build_case(8, kv_len=300, num_kv_heads=3, group_size=2, batch=1)
    index = case.index(backend)
    assert head_rules(parse("/".join(specs)), index.sketch, 3) is not None
    both = attend(case.q, index, policy="/".join(specs), record=True)
    for head, spec in enumerate(specs):
        alone, mine = attend(case.q, index, policy=spec, record=True), slice(2 * head, 2 * head + 2)
        for name in ("out", "lse", "certificate", "arithmetic_bound", "dropped_mass_bound", "tau", "exact_mask"):
            assert torch.equal(getattr(both, name)[:, mine], getattr(alone, name)[:, mine]), name
        assert torch.equal(both.stats.table[:, head], alone.stats.table[:, head])


@fused
def test_what_can_not_be_split_is_not(backend):
    index = build_case(8, kv_len=100, num_kv_heads=2, group_size=2, batch=1).index(backend)
    rows = build_case(8, kv_len=100, num_kv_heads=2, group_size=2, batch=2).index(backend)
    spec = parse("exact:0.1/exact:0.2")
    assert head_rules(spec, index.sketch, 2) is not None
    assert head_rules(spec, rows.sketch, 2) is None, "two rows own the blocks"
    assert head_rules(parse("exact:0.1"), index.sketch, 2) is None
    by_query_head = parse("exact:0.1/exact:0.2/exact:0.1/exact:0.2")
    assert head_rules(by_query_head, index.sketch, 2) is None, "the heads of a group differ"
