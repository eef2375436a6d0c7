"""DenseAttention against softmax written out in float64."""

import math

import pytest
import torch

from louver.attention import DenseAttention
from louver.errors import NonFiniteError, ShapeError
from louver.protocols import LayerAttention


def attend_in_float64(q, keys, values, softmax_scale, kv_start):
    """out and lse by the textbook."""
    group_size = q.shape[1] // keys.shape[1]
    q, keys, values = q.double(), keys.double().repeat_interleave(group_size, 1), values.double()
    logits = torch.einsum("bhd,bhnd->bhn", q, keys) * softmax_scale
    logits.masked_fill_((torch.arange(keys.shape[2]) < kv_start[:, None])[:, None], -torch.inf)
    out = torch.einsum("bhn,bhnd->bhd", logits.softmax(-1), values.repeat_interleave(group_size, 1))
    return out, logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 288])
@pytest.mark.parametrize("kv_start", [None, [0, 3, 16]])
@pytest.mark.parametrize("group_size", [1, 3])
def test_error_is_within_the_arithmetic_bound(group_size, kv_start, head_dim, dtype):
    keys, values = torch.randn(2, 3, 2, 17, head_dim).to(dtype)
    q = torch.randn(3, 2 * group_size, head_dim).to(dtype)
    attention = DenseAttention()
    attention.append(keys, values)
    result = attention.attend(q, head_dim**-0.5, None if kv_start is None else torch.tensor(kv_start))
    out, lse = attend_in_float64(q, keys, values, head_dim**-0.5, torch.tensor(kv_start or [0, 0, 0]))
    error = (result.out.double() - out).norm(dim=-1)
    assert result.out.dtype == dtype
    assert (error <= result.arithmetic_bound).all()
    assert (result.certificate == 0).all() and (result.dropped_mass_bound == 0).all()
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)


def test_is_a_layer_attention():
    assert isinstance(DenseAttention(), LayerAttention)


def test_stats_count_every_valid_key_once_per_kv_head():
    attention = DenseAttention()
    attention.append(torch.randn(2, 2, 10, 64), torch.randn(2, 2, 10, 64))
    stats = attention.attend(torch.randn(2, 6, 64), 0.1, torch.tensor([0, 4])).stats
    assert stats.num_keys.tolist() == [[10, 10], [6, 6]]
    assert torch.equal(stats.num_exact, stats.num_keys) and torch.equal(stats.num_scanned, stats.num_keys)
    assert not stats.num_coarse.any() and not stats.num_unread.any()
    assert stats.bytes_dense.tolist() == [[10 * 256] * 2, [6 * 256] * 2]
    assert stats.bytes_fraction == 1.0 and stats.fraction("exact") == 1.0


def test_records_which_keys_were_exact():
    attention = DenseAttention()
    attention.append(torch.randn(2, 2, 5, 64), torch.randn(2, 2, 5, 64))
    q = torch.randn(2, 4, 64)
    assert attention.attend(q, 0.1).exact_mask is None
    attention.record = True
    assert attention.attend(q, 0.1).exact_mask.all()
    mask = attention.attend(q, 0.1, torch.tensor([0, 2])).exact_mask
    assert mask.shape == (2, 4, 5) and mask[1, 0].tolist() == [False, False, True, True, True]


def test_refuses_a_query_that_does_not_fit():
    attention = DenseAttention()
    attention.append(torch.randn(2, 2, 5, 64), torch.randn(2, 2, 5, 64))
    with pytest.raises(ShapeError, match="multiple"):
        attention.attend(torch.randn(2, 3, 64), 0.1)
    with pytest.raises(NonFiniteError):
        attention.attend(torch.full((2, 4, 64), torch.nan), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_len", [0, 5])
def test_a_row_without_tokens_gives_zeros(kv_len, dtype):
    """torch's own attention gives NaN for no keys in float16, and zeros in float32."""
    keys = torch.randn(2, 2, kv_len, 64).to(dtype)
    q = torch.full((2, 4, 64), 1e4).to(dtype)
    attention = DenseAttention()
    attention.append(keys, keys)
    result = attention.attend(q, 0.125, torch.tensor([kv_len, 0], dtype=torch.int32))
    empty = [0] if kv_len else [0, 1]
    assert (result.out[empty] == 0).all() and torch.isneginf(result.lse[empty]).all()
    assert torch.isfinite(result.out).all()


def test_lse_of_scores_beyond_float16():
    keys, q = torch.full((1, 1, 3, 64), 100.0), torch.full((1, 1, 64), 50.0)
    attention = DenseAttention()
    attention.append(keys.half(), keys.half())
    assert attention.attend(q.half(), 1.0).lse.item() == pytest.approx(320_000 + math.log(3))


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16", "bfloat16"), ("float32", "float16", "bfloat16")])
def test_query_keys_and_values_may_differ_in_dtype(dtypes):
    q, keys, values = (torch.randn(2, 2, 17, 64).to(getattr(torch, name)) for name in dtypes)
    attention = DenseAttention()
    attention.append(keys, values)
    result = attention.attend(q[:, :, 0], 0.125, torch.tensor([0, 5]))
    out, lse = attend_in_float64(q[:, :, 0], keys, values, 0.125, torch.tensor([0, 5]))
    assert result.out.dtype == q.dtype
    assert ((result.out.double() - out).norm(dim=-1) <= result.arithmetic_bound).all()
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_start", [None, [0, 3, 16]])
def test_a_step_asks_the_device_nothing_it_was_told_before(kv_start, monkeypatch):
    """On a GPU, each such question would make the host wait for everything before it."""
    keys, values = torch.randn(2, 3, 2, 17, 64)
    q = torch.randn(3, 2, 64)
    start = None if kv_start is None else torch.tensor(kv_start, dtype=torch.int32)
    attention = DenseAttention()
    attention.append(keys, values)
    attention.attend(q, 0.125, start)
    attention.append(keys[:, :, :1], values[:, :, :1])
    asked = []
    monkeypatch.setattr("louver.attention.dense.check_query", lambda *_: None)  # looks at every query, by contract
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: asked.append(x) or x.item())
    attention.attend(q, 0.125, start)
    assert not asked
