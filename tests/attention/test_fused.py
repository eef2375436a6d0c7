"""What a backend is asked for in its own launches says what the policy says."""

from types import ModuleType

import pytest
import torch

from helpers import build_case
from louver import attend
from louver.attention.fused import follows, members_of, wanted_by
from louver.kernels import get_ops
from louver.policies import parse
from louver.policies.union import Union
from louver.protocols import CutRule


@pytest.mark.parametrize(
    "spec, wanted",
    [
        ("mass:0.1", {"dropped_mass": 0.1}),
        ("relative:8", {"nats": 8.0}),
        ("sample-max", {}),
        ("topk:20|mass:0.1", {"share": 0.0, "count": 20, "dropped_mass": 0.1}),
        ("mass:0.1|mass:0.2|relative:3|relative:5", {"dropped_mass": 0.1, "nats": 5.0}),
        ("fixed:3|relative:5|sample-gap", {"tau": 3.0, "nats": 5.0}),
        ("fixed:3|fixed:2", {"tau": 2.0}),
        ("exact:0.1|exact:0.2", None),
        ("error:0.1", None),
    ],
)
def test_a_union_asks_for_the_most_of_each_kind(spec, wanted):
    assert wanted_by(parse(spec)) == wanted


def test_a_backend_follows_what_it_has_launches_for():
    plain, looking = get_ops("reference"), ModuleType("looking")
    looking.attend_in_looks = None  # pyright: ignore[reportAttributeAccessIssue]
    for spec in ("topk:5", "exact:0.1", "topk:5|budget:0.1"):
        assert follows(parse(spec), plain)
    for spec in ("mass:0.1", "relative:3", "sample-max", "topk:5|mass:0.1"):
        assert not follows(parse(spec), plain) and follows(parse(spec), looking)
    assert not follows(parse("error:0.1"), looking)
    assert not follows(parse("exact:0.1/exact:0.2"), looking)


def test_rules_of_one_kind_are_one_rule():
    assert parse("topk:20|budget:0.05|topk:7").rule() == CutRule(drop=True, share=0.05, count=20)
    assert parse("fixed:3|fixed:1.5").rule() == CutRule(drop=True, tau=1.5)
    one, other = parse("exact:0.1").rule(), parse("exact:0.1|exact:0.02").rule()
    assert one is not None and one == other
    for spec in ("topk:20|fixed:3", "topk:20|mass:0.1", "topk:3|sample-max"):
        assert parse(spec).rule() is None, spec


def test_a_union_of_counts_keeps_what_the_larger_keeps():
    case = build_case(3, kv_len=300)
    both, larger = (attend(case.q, case.index("reference"), policy=p, record=True) for p in ("topk:4|topk:9", "topk:9"))
    assert torch.equal(both.exact_mask, larger.exact_mask) and torch.equal(both.tau, larger.tau)


def test_a_union_within_a_union_keeps_its_members():
    inner = parse("sample-max|topk:4")
    outer = Union(members=(inner, parse("mass:0.1")))
    assert [m.spec for m in members_of(outer)] == [*(m.spec for m in inner.members), "mass:0.1"]
    assert wanted_by(outer) == {"share": 0.0, "count": 4, "dropped_mass": 0.1}
