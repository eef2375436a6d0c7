"""Baselines serve a transformers model through the cache that Louver uses."""

import pytest

from integrations import tiny_models
from integrations.scenarios import greedy, left_padded_batch, second_turn
from louver.experiments.baselines import served
from louver.integrations.transformers import LouverCache, attach

NAMES = ("streaming", "h2o", "snapkv", "quest", "twilight", "hnsw")


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


@pytest.mark.parametrize("scenario", [greedy, left_padded_batch, second_turn])
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_everything_decodes_the_dense_tokens(model, prompts, name, scenario):
    attach(model)
    dense = scenario(model, prompts, LouverCache(model.config, policy="dense"))
    cache = LouverCache(model.config, layer=served(f"{name}:1"))
    assert scenario(model, prompts, cache).tolist() == dense.tolist()
    assert cache.summary().num_steps


@pytest.mark.parametrize("name", NAMES)
def test_a_small_budget_reads_less(model, prompts, name):
    attach(model)
    cache = LouverCache(model.config, layer=served(f"{name}:0.3"))
    greedy(model, prompts, cache)
    assert 0 < cache.summary().exact_fraction < (1 if name == "snapkv" else 0.75)
