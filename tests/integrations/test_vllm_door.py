"""What the vLLM plug-in reads and refuses, without vLLM."""

import pytest
import torch

from louver.attention import PagedAttention, PagedRows
from louver.errors import PolicyError, UnsupportedModelError
from louver.integrations.vllm.audit import audit
from louver.integrations.vllm.settings import Settings, settings_of
from louver.integrations.vllm.support import check_engine, check_layer, frame_len_for, left_to_vllm
from louver.integrations.vllm.totals import Totals
from louver.policies import DEFAULT_POLICY
from louver.sketch import SketchConfig

PLAIN = {"kv_connector": False, "decode_context_parallel": 1, "cache_dtype": "auto"}


@pytest.mark.parametrize(
    "config, environment, policy",
    [
        ({}, {}, None),
        (None, {}, None),
        ({}, {"LOUVER_VLLM_POLICY": " "}, None),
        ({}, {"LOUVER_VLLM_POLICY": "exact:0.02"}, "exact:0.02"),
        ({"louver": True}, {}, DEFAULT_POLICY),
        ({"louver": {}}, {}, DEFAULT_POLICY),
        ({"louver": "topk:64"}, {"LOUVER_VLLM_POLICY": "exact:0.02"}, "topk:64"),
        ({"louver": {"frame_len": 64}}, {"LOUVER_VLLM_POLICY": "exact:0.02"}, "exact:0.02"),
        ({"louver": False}, {"LOUVER_VLLM_POLICY": "exact:0.02"}, None),
    ],
)
def test_louver_is_off_unless_asked_for(config, environment, policy):
    settings = settings_of(config, environment)
    assert (settings and settings.policy) == policy


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"polcy": "exact:0.1"}, "unknown setting of louver: polcy; known: policy, "),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy": "dense"}, "can't be followed over a paged cache"),
        (3, '"louver" is 3; wanted a policy or an object of settings'),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(asked, message):
    with pytest.raises(PolicyError, match=message):
        settings_of({"louver": asked}, {})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_connector": True}, "KV connector"),
        ({"decode_context_parallel": 2}, "--decode-context-parallel-size 2"),
        ({"cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
        ({"mla": True}, "MLA"),
    ],
)
def test_an_engine_louver_cannot_serve_is_refused(change, message):
    check_engine(**PLAIN)
    with pytest.raises(UnsupportedModelError, match=message):
        check_engine(**PLAIN | change)


@pytest.mark.parametrize("change", [{"alibi": True}, {"softcap": 50.0}, {"sinks": True}])
def test_a_model_louver_cannot_serve_is_refused(change):
    plain = {"alibi": False, "softcap": 0.0, "sinks": False}
    check_layer(**plain)
    with pytest.raises(UnsupportedModelError, match="its attention has"):
        check_layer(**plain | change)


def test_other_layers_are_left_to_vllm():
    plain = {"sliding_window": False, "attn_type": "decoder", "kv_sharing": False}
    assert list(left_to_vllm(**plain)) == []
    for change in ({"sliding_window": True}, {"attn_type": "encoder"}, {"kv_sharing": True}):
        assert len(list(left_to_vllm(**plain | change))) == 1


def test_blocks_of_a_sketch_fill_a_page():
    assert [frame_len_for(n, None) for n in (64, 128, 192, 256)] == [64, 128, 64, 128]
    assert frame_len_for(96, 32) == 32
    with pytest.raises(UnsupportedModelError, match=r"pages hold 16 tokens; start vLLM with --block-size 64 or 128"):
        frame_len_for(16, None)


def test_the_audit_finds_what_a_step_lost_and_the_totals_say_so():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, 1, 16, 32, generator=generator) for _ in range(2))
    paged = PagedAttention("exact:0.05", 4, 1, 16, 32, config=SketchConfig(frame_len=16))
    rows = PagedRows.of(torch.tensor([[2, 0, 3]]), torch.tensor([40]), 16, 40)
    q, totals = torch.randn(1, 2, 32, generator=generator), Totals(num_rows=1, num_steps=1)
    result = paged.attend(q, keys, values, rows, 0.2, record=True)
    totals.add(result)
    audit(totals, result, q, keys, values, rows, 0.2)
    assert (totals.num_decisions, totals.num_false_negatives, totals.num_bound_violations) == (80, 0, 0)
    assert "audit: 0 false negatives and 0 bound violations in 80 decisions" in totals.line()
    assert totals.stats.num_keys.tolist() == [[40]]
    result.exact_mask[:] = False
    result.out[:] += 100
    audit(totals, result, q, keys, values, rows, 0.2)
    assert totals.num_false_negatives == totals.num_relevant // 2 > 0
    assert totals.num_bound_violations == 2


def test_a_line_is_due_when_time_has_passed_and_something_happened():
    totals = Totals()
    assert totals.line_if_due(0.0) is None
    totals.num_left_rows = 3
    assert totals.line_if_due(3600.0) is None
    assert "no decode step yet, 3 rows left to vLLM" in (totals.line_if_due(0.0) or "")


def test_settings_say_what_they_are():
    assert Settings().policy == DEFAULT_POLICY
    with pytest.raises(PolicyError):
        Settings(policy="exact:2")
