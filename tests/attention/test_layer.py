"""LouverAttention serves decode steps through the LayerAttention seam: the same tokens however the cache was handled."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import build_case, true_attention, within_certificate
from louver import LouverAttention
from louver.attention import DenseAttention
from louver.kernels import available_backends, crossover
from louver.protocols import LayerAttention
from louver.sketch import SketchConfig
from strategies import cases, generator

CONFIG = SketchConfig(frame_len=16)
SPECS = ["exact:0.1", "exact:1.0", "topk:4+sinks:2+recent:3", "budget:0.2", "fixed:1", "dense"]


def layer_over(case, spec, kv_start=None, **options):
    layer = LouverAttention(spec, config=CONFIG, **options)
    layer.append(case.keys, case.values)
    seen = torch.randn(case.q.shape[0], case.q.shape[1], 5, case.q.shape[2], generator=generator(5))
    layer.observe(seen.to(case.q.dtype), kv_start, 0.125)
    return layer


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_step_keeps_its_certificate_while_the_cache_grows(spec, dtype):
    case = build_case(1, kv_len=90, dtype=dtype, traits=frozenset({"offset"}))
    layer = LouverAttention(spec, config=CONFIG)
    for at in range(0, 90, 7):
        layer.append(case.keys[:, :, at : at + 7], case.values[:, :, at : at + 7])
        end = min(90, at + 7)
        assert layer.kv_len == end
        seen = copy.copy(case)
        object.__setattr__(seen, "kv_len", torch.full((2,), end, dtype=torch.int32))
        result = layer.attend(case.q, case.softmax_scale)
        assert within_certificate(seen, result).all()


@pytest.mark.parametrize("spec", SPECS)
def test_left_padding_is_not_seen(spec):
    case = build_case(2, kv_len=60)
    kv_start = torch.tensor([0, 23], dtype=torch.int32)
    result = layer_over(case, spec, kv_start).attend(case.q, 0.125, kv_start)
    short = LouverAttention(spec, config=CONFIG)
    short.append(case.keys[1:, :, 23:], case.values[1:, :, 23:])
    expected = short.attend(case.q[1:], 0.125)
    error = (result.out[1] - expected.out[0]).norm(dim=-1)
    allowed = sum((x.certificate + x.arithmetic_bound)[i] for x, i in ((result, 1), (expected, 0)))
    assert (error <= allowed).all()
    assert torch.equal(result.stats.num_keys[1], expected.stats.num_keys[0])


def test_padding_of_whole_blocks_and_of_every_token():
    case = build_case(2, kv_len=64)
    kv_start = torch.tensor([64, 32], dtype=torch.int32)
    for spec in SPECS[:-1]:
        result = layer_over(case, spec, kv_start).attend(case.q, 0.125, kv_start)
        assert (result.out[0] == 0).all() and torch.isfinite(result.out[1]).all()


@pytest.mark.parametrize(
    ("spec", "index"),
    [(spec, "sketch") for spec in SPECS] + [(spec, "flat") for spec in SPECS if not spec.startswith("exact")],
)
def test_truncate_select_and_copy(spec, index):
    case = build_case(3, kv_len=80)
    layer = layer_over(case, spec, index=index)
    before = layer.attend(case.q, 0.125).out
    twin = copy.deepcopy(layer)
    twin.append(torch.randn(2, 2, 9, 64), torch.randn(2, 2, 9, 64))
    twin.attend(case.q, 0.125)
    torch.testing.assert_close(layer.attend(case.q, 0.125).out, before)
    twin.truncate(80)
    torch.testing.assert_close(twin.attend(case.q, 0.125).out, before)
    layer.select_batch(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(layer.attend(case.q[[1, 1, 0]], 0.125).out, before[[1, 1, 0]])
    layer.truncate(3)
    assert layer.kv_len == 3
    out = layer.attend(case.q[[1, 1, 0]], 0.125).out
    short = copy.copy(case)
    object.__setattr__(short, "kv_len", torch.full((2,), 3, dtype=torch.int32))
    if spec in ("exact:0.1", "exact:1.0", "dense"):
        torch.testing.assert_close(out.double(), true_attention(short)[[1, 1, 0]], atol=1e-5, rtol=1e-4)


def test_a_retrieval_in_a_model_never_selects_nothing():
    case = build_case(4, kv_len=64)
    result = layer_over(case, "fixed:1e30").attend(case.q, 0.125)
    assert torch.isfinite(result.lse).all()


def test_recording_fills_the_mask_only_when_asked():
    layer = layer_over(build_case(4, kv_len=64), "exact:0.1")
    assert layer.attend(torch.randn(2, 4, 64), 0.125).exact_mask is None
    layer.record = True
    assert layer.attend(torch.randn(2, 4, 64), 0.125).exact_mask.shape == (2, 4, 64)


def test_counts_add_up_and_bytes_follow():
    case = build_case(4, kv_len=256, batch=1, config=SketchConfig(frame_len=128))
    layer = LouverAttention("exact:0.05", config=SketchConfig(frame_len=128))
    layer.append(case.keys[:, :, :200], case.values[:, :, :200])
    stats = layer.attend(case.q, 0.125).stats
    assert (stats.num_keys == 200).all() and (stats.count("blocks") == 1).all() and (stats.count("open") == 72).all()
    assert (stats.num_exact + stats.num_coarse + stats.num_unread == 200).all()
    assert 0 < stats.bytes_fraction < 1
    assert stats.fraction("exact") == pytest.approx(stats.num_exact.sum().item() / 400)
    assert (stats.bytes_dense == 200 * 4 * 64).all()


def test_the_seam_is_met_and_memory_is_told():
    case = build_case(4, kv_len=256)
    layer = layer_over(case, "exact:0.1")
    assert isinstance(layer, LayerAttention) and isinstance(DenseAttention(), LayerAttention)
    held = layer.memory_bytes()
    assert held["keys_values"] >= 2 * case.keys.numel() * 4 and held["index"] > 0
    assert layer_over(case, "topk:3", index="flat").memory_bytes()["index"] == 0


@pytest.mark.parametrize("backend", available_backends())
@given(cases(ragged=False, max_blocks=3), st.integers(1, 16), st.sampled_from(SPECS[:-1]), st.booleans(), st.booleans())
def test_several_tokens_at_once(backend, case, q_len, spec, padded, prompt_first):
    """Each is within its certificate of float64 over the tokens up to its own, and its mask ends there."""
    batch, num_q_heads, head_dim = case.q.shape
    kv_len = case.keys.shape[2]
    assume(kv_len >= q_len)
    kv_start = torch.tensor([0, max(0, kv_len - q_len - 3), 1][:batch] if padded else [0] * batch, dtype=torch.int32)
    kv_start = kv_start.clamp(max=kv_len - q_len)
    layer = LouverAttention(spec, config=case.config, backend=backend)
    layer.record = True
    q = torch.stack([case.q.roll(i, 1) for i in range(q_len)], 2)
    first = kv_len - q_len if prompt_first else 0
    if first:
        layer.append(case.keys[:, :, :first], case.values[:, :, :first])
        layer.observe(q[:, :, :first], kv_start, case.softmax_scale)
    layer.append(case.keys[:, :, first:], case.values[:, :, first:])
    result = layer.attend_many(q, case.softmax_scale, kv_start)
    assert result.out.shape == (batch * q_len, num_q_heads, head_dim)
    position = torch.arange(kv_len)
    for i in range(q_len):
        end = kv_len - q_len + 1 + i
        seen = dataclasses.replace(case, q=q[:, :, i], kv_start=kv_start, kv_len=torch.full((batch,), end).int())
        part = SimpleNamespace(
            out=result.out[i::q_len],
            certificate=result.certificate[i::q_len],
            arithmetic_bound=result.arithmetic_bound[i::q_len],
        )
        assert within_certificate(seen, part).all()
        assert (result.stats.num_keys[i::q_len] == (end - kv_start)[:, None]).all()
        assert not result.exact_mask[i::q_len][..., position >= end].any()


@pytest.mark.parametrize("backend", available_backends())
def test_one_token_of_several_is_what_it_is_alone(backend):
    case = build_case(7, kv_len=96, batch=1)
    with crossover.switched(False):
        alone, together = (layer_over(case, "exact:0.1", backend=backend) for _ in range(2))
        q = torch.randn(1, 4, 5, 64)
        result = together.attend_many(q, 0.125)
        one = alone.attend(q[:, :, -1], 0.125)
    assert one.certificate.min() > 0 and one.stats.bytes_fraction < 1, "served by the sketch"
    torch.testing.assert_close(result.out[-1:], one.out)
    assert layer_over(case, "dense").attend_many(q, 0.125) is None
    assert layer_over(case, "topk:3", index="flat").attend_many(q, 0.125) is None
