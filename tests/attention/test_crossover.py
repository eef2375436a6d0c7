"""Short caches on the CPU are attended densely: the same promises, exactly kept, and counts that say what was read."""

import pytest
import torch

from helpers import build_case, true_scores, within_certificate
from louver import LouverAttention, attend
from louver.kernels import available_backends, crossover
from louver.kernels.cpu import native
from louver.kernels.cpu.crossover import is_short
from louver.sketch import SketchConfig

# Without a compiler there is nothing to test; .ci/run fails where they are not built, so there these run.
pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="the crossover is the compiled backend's")


@pytest.fixture
def case(monkeypatch):
    """Three blocks and a half, padded; far below the crossover."""
    monkeypatch.setattr(crossover, "enabled", True)
    return build_case(3, kv_len=56, batch=2, ragged=True, config=SketchConfig(frame_len=16))


@pytest.mark.parametrize("spec", ["exact:0.01", "topk:3", "budget:0.1+sinks:2", "fixed:2"])
def test_every_key_is_exact_and_counted(case, spec):
    result = attend(case.q, case.index(backend="cpu"), policy=spec, record=True)
    assert within_certificate(case, result).all()
    assert torch.equal(result.exact_mask, case.valid().expand_as(result.exact_mask))
    assert (result.certificate == 0).all() and (result.tau == -torch.inf).all()
    assert torch.equal(result.stats.bytes_read, result.stats.bytes_dense)
    truth = (true_scores(case) * case.softmax_scale).nan_to_num(nan=-torch.inf).logsumexp(-1)
    torch.testing.assert_close(result.lse.double(), truth, rtol=1e-5, atol=1e-5)


def test_several_tokens_too(case):
    layer = LouverAttention("exact:0.1", config=case.config, backend="cpu")
    layer.append(case.keys, case.values)
    result = layer.attend_many(case.q[:, :, None].expand(-1, -1, 4, -1), case.softmax_scale)
    assert (result.certificate == 0).all()
    assert result.stats.num_keys[:4, 0].tolist() == [53, 54, 55, 56]


@pytest.mark.parametrize(
    ("isa", "dtype", "tokens", "short"),
    [
        ("avx512", torch.float32, 900, True),
        ("avx512", torch.float32, 10**4, False),
        ("avx512", torch.bfloat16, 3900, True),  # of a narrow key in 16 bits there is less to save
        ("avx512", torch.bfloat16, 16384, False),
        ("avx2", torch.float32, 900, True),
        ("avx2", torch.bfloat16, 1800, True),
        ("avx2", torch.bfloat16, 4000, False),
    ],
)
def test_where_it_lies(monkeypatch, isa, dtype, tokens, short):
    monkeypatch.setattr(native, "isa", isa)
    monkeypatch.setattr(crossover, "enabled", True)
    keys = torch.empty(1, 3, 1, 64, dtype=dtype).expand(1, 3, tokens, 64)
    rows = torch.zeros(1, dtype=torch.int32), torch.full((1,), tokens, dtype=torch.int32)
    assert is_short(keys, *rows) is short
    monkeypatch.setattr(crossover, "enabled", False)
    assert not is_short(keys, *rows)
    monkeypatch.setattr(crossover, "enabled", True)
    two = keys.expand(2, -1, -1, -1)  # one long row and one of nothing: what counts is their sum
    lengths = torch.tensor([0, tokens], dtype=torch.int32)
    assert is_short(two, torch.zeros(2, dtype=torch.int32), lengths) is short
