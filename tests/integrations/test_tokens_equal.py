"""Whatever one does with a cache, the tokens are those of transformers' own sdpa and DynamicCache."""

import pytest
import torch
from transformers import DynamicCache

from integrations.scenarios import SCENARIOS, crop_and_regenerate, prompt_lookup
from integrations.tiny_models import FAMILIES
from louver.attention import DenseAttention
from louver.integrations.transformers import attach

# A sliding window can't go back into the prompt, in any cache.
CASES = [(f, s) for f in FAMILIES for s in SCENARIOS if not (f == "gemma3" and s is crop_and_regenerate)]


@pytest.mark.parametrize(("family", "scenario"), CASES, ids=[f"{f}-{s.__name__}" for f, s in CASES])
def test_tokens_equal_sdpa(family, scenario, prompts, layer):
    model = FAMILIES[family]()
    expected = scenario(model, prompts, DynamicCache(config=model.config))

    cache = attach(model, layer=layer)
    tokens = scenario(model, prompts, cache)

    assert torch.equal(tokens, expected)
    one_at_a_time = isinstance(cache.served_layers[0].attention, DenseAttention)
    assert cache.summary().num_steps > 0 or (one_at_a_time and scenario is prompt_lookup)  # which verifies several
    assert cache.stats.num_dense_calls == 0
