"""Whatever one does with a cache, the tokens are those of transformers' own sdpa and DynamicCache."""

import pytest
import torch
from transformers import DynamicCache

from integrations.scenarios import SCENARIOS, prompt_lookup
from louver.integrations.transformers import attach


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_tokens_equal_sdpa(scenario, tiny_model, prompts, layer):
    expected = scenario(tiny_model, prompts, DynamicCache(config=tiny_model.config))

    cache = attach(tiny_model, layer=layer)
    tokens = scenario(tiny_model, prompts, cache)

    assert torch.equal(tokens, expected)
    assert cache.summary().num_steps > 0 or scenario is prompt_lookup  # which may verify several tokens at every step
    assert cache.stats.num_dense_calls == 0
