"""The running totals: whatever waits together, the sums of one step after another."""

import pytest
import torch

from louver.attention import LouverAttention
from louver.attention.dense import DenseAttention
from louver.integrations.transformers.stats import DecodeStats
from louver.kernels import crossover
from louver.sketch import SketchConfig

SCALE, FIELDS = (
    32**-0.5,
    ("num_keys", "num_scanned", "num_exact", "num_coarse", "num_unread", "bytes_read", "bytes_dense"),
)


def results(make, steps, batch, seed):
    random = torch.Generator().manual_seed(seed)
    layer = make()
    keys = torch.randn(batch, 2, 60, 32, generator=random)
    layer.append(keys, keys.flip(2))
    for _ in range(steps):
        yield layer.attend(torch.randn(batch, 4, 32, generator=random), SCALE)


@pytest.mark.parametrize("counts", [(70, 70, 70), (70, 70, 3), (1, 64, 200)])
def test_layers_taken_together_have_the_sums_of_each(counts):
    config = SketchConfig(frame_len=8)
    makes = [
        lambda: LouverAttention("exact:0.1", config=config),
        lambda: LouverAttention("topk:5", config=config),
        DenseAttention,
    ]
    with crossover.switched(False):
        given = [list(results(make, n, 1 + i % 2, i)) for i, (make, n) in enumerate(zip(makes, counts, strict=True))]
        given.append(list(results(makes[0], counts[0], 1, 9)))  # of the form of the first layer
    stats = DecodeStats()
    for step in range(max(counts)):
        for layer, some in enumerate(given):
            if step < len(some):
                stats.add(layer, some[step])
    for layer, got in enumerate(stats.per_layer()):
        some = given[layer]
        assert got.layer_idx == layer and got.num_steps == len(some)
        for name in FIELDS:
            assert getattr(got, name) == sum(int(getattr(one.stats, name).sum()) for one in some), name
        relative = torch.cat([(one.certificate / one.out.norm(dim=-1)).flatten() for one in some]).double()
        assert got.certificate_mean == pytest.approx(relative.mean().item(), rel=1e-5)
        assert got.certificate_worst == pytest.approx(relative.max().item(), rel=1e-5)
        assert got.dropped_mass_bound_worst == pytest.approx(max(one.dropped_mass_bound.max().item() for one in some))
    whole, parts = stats.summary(), stats.per_layer()
    for name in ("num_steps", *FIELDS):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    assert whole.certificate_worst == max(part.certificate_worst for part in parts)


def test_little_waits_of_large_batches():
    stats = DecodeStats()
    for one in results(lambda: LouverAttention("topk:5"), 3, 3000, 0):
        stats.add(0, one)
        assert not stats._totals._waiting  # 1.5 MiB of outputs


def test_layers_a_step_apart_whose_steps_have_other_numbers_of_rows(monkeypatch):
    """Dense steps of several tokens, as in assisted decoding; a settle falls in the middle of a token."""
    monkeypatch.setattr("louver.integrations.transformers.stats._PENDING", 8)
    taken, alone = DecodeStats(), [DecodeStats() for _ in range(5)]
    layers = [LouverAttention() for _ in alone]
    random = torch.Generator().manual_seed(0)
    for layer in layers:
        prompt = torch.randn(1, 2, 300, 32, generator=random)
        layer.append(prompt, prompt)
    for step in range(20):
        new_len = 1 + 7 * step % 5
        for i, layer in enumerate(layers):
            new, q = (torch.randn(1, heads, new_len, 32, generator=random) for heads in (2, 4))
            layer.append(new, new)
            for stats, index in ((taken, i), (alone[i], 0)):
                with crossover.switched(True):
                    stats.add(index, layer.attend_many(q, SCALE) if new_len > 1 else layer.attend(q[:, :, 0], SCALE))
    for summary, stats in zip(taken.per_layer(), alone, strict=True):
        assert all(getattr(summary, name) == getattr(stats.summary(), name) for name in (*FIELDS, "num_steps"))


def test_layers_of_another_batch_a_step_apart():
    stats = DecodeStats()
    for batch, steps in ((1, 67), (2, 70)):
        layers = [DenseAttention() for _ in range(3)]
        for layer in layers:
            layer.append(*(torch.randn(batch, 2, 9, 32) for _ in range(2)))
        for _ in range(steps):
            for i, layer in enumerate(layers):
                stats.add(i, layer.attend(torch.randn(batch, 4, 32), SCALE))
    assert [s.num_keys for s in stats.per_layer()] == [2 * 9 * (67 + 2 * 70)] * 3


@pytest.mark.parametrize("policy", ["exact:0.1", "topk:5"])
def test_nothing_is_certified_of_an_output_that_is_not_finite(policy):
    stats, layer = DecodeStats(), LouverAttention(policy)
    keys, values = torch.randn(2, 1, 2, 300, 32).unbind(0)
    values[0, 0, 299, 3] = torch.nan
    layer.append(keys, values)
    with crossover.switched(False):
        stats.add(0, layer.attend(torch.randn(1, 4, 32), SCALE))
    for summary in (stats.summary(), *stats.per_layer()):
        assert summary.certificate_worst == summary.certificate_mean == torch.inf
