"""A model's own loop over layers whose steps are replayed: whatever one does with the cache, the tokens and the figures of launched steps."""

import pytest
import torch

from fake_graphs import replayed
from integrations.scenarios import SCENARIOS
from integrations.tiny_models import llama
from louver.attention import LouverAttention
from louver.integrations.transformers import attach
from louver.kernels import crossover
from louver.sketch.layout import SketchConfig

CONFIG = SketchConfig(frame_len=8)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_scenarios(scenario, prompts):
    model = llama()
    with crossover.switched(False):
        launched = attach(model, layer=lambda _: LouverAttention("exact:0.3", config=CONFIG))
        expected = scenario(model, prompts, launched)
        cache = attach(model, layer=lambda _: replayed("exact:0.3", config=CONFIG))
        assert torch.equal(scenario(model, prompts, cache), expected)
    want, got = launched.summary(), cache.summary()
    assert got.num_steps == want.num_steps > 0
    for name in (
        "num_keys",
        "num_exact",
        "num_coarse",
        "num_scanned",
        "bytes_read",
        "bytes_dense",
        "certificate_worst",
    ):
        assert getattr(got, name) == getattr(want, name), name
    assert got.certificate_mean == pytest.approx(want.certificate_mean, rel=1e-6)


def test_history_and_figures_of_replayed_steps(prompts):
    """One by one, while the totals take many together."""
    model = llama()
    with crossover.switched(False):
        caches = [attach(model, layer=make, history=1000) for make in (
            lambda _: LouverAttention("topk:5", config=CONFIG), lambda _: replayed("topk:5", config=CONFIG)
        )]  # fmt: skip
        for cache in caches:
            model.generate(**prompts.single, **cache.kwargs(), max_new_tokens=80, min_new_tokens=80, do_sample=False)
    (one, other) = caches
    assert len(one.stats.history) == len(other.stats.history) == 2 * 79
    for (layer, stats), (twin, want) in zip(other.stats.history, one.stats.history, strict=True):
        assert layer == twin
        assert torch.equal(stats.table, want.table)
    assert other.summary().num_exact == sum(int(stats.num_exact.sum()) for _, stats in other.stats.history)
    assert other.stats.per_layer()[1].bytes_read == one.stats.per_layer()[1].bytes_read
    assert other.served_layers[0].attention._replayed._attending.held is not None
