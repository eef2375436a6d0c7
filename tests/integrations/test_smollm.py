"""The same comparisons on a real model, where attention is what training made it."""

import pytest
import torch
from transformers import DynamicCache

from integrations.scenarios import SCENARIOS, Prompts, generate
from louver.attention import DenseAttention, LouverAttention
from louver.integrations.transformers import LouverCache, attach
from louver.sketch.layout import SketchConfig

pytestmark = pytest.mark.model

TEXTS = (
    "The rain had stopped an hour before sunrise. The keeper of the lighthouse climbed the stairs, counted the steps as he "
    "always did, and found that there was one more than yesterday. He went down again, counted again, and wrote the number "
    "in his book. The rain had stopped an hour before sunrise. The keeper of the",
    "To make bread you need flour, water, salt and",
    "Q: Which planet is closest to the sun? A: Mercury. Q: Which planet has the largest moon? A:",
)
FOLLOW_UP = " Then somebody knocked at the door:"


@pytest.fixture
def model(smollm):
    model, _ = smollm
    yield model
    model.set_attn_implementation("sdpa")


@pytest.fixture(scope="session")
def prompts(smollm) -> Prompts:
    model, tokenizer = smollm
    ids = [torch.tensor(tokenizer(text)["input_ids"], device=model.device) for text in (*TEXTS, FOLLOW_UP)]
    return Prompts(rows=ids[:3], follow_up=ids[3][None], pad=tokenizer.pad_token_id)


@pytest.fixture(scope="session")
def expected(smollm, prompts):
    """scenario -> the tokens of sdpa, worked out once for all ways of serving."""
    model, _ = smollm
    known: dict = {}

    def tokens(scenario):
        if scenario not in known:
            model.set_attn_implementation("sdpa")
            known[scenario] = scenario(model, prompts, DynamicCache(config=model.config))
        return known[scenario]

    return tokens


@pytest.mark.parametrize(
    "layer",
    [lambda _: DenseAttention(), lambda _: LouverAttention("exact:1.0", config=SketchConfig(frame_len=32))],
    ids=["dense", "exact:1.0"],
)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_tokens_equal_sdpa(scenario, layer, model, prompts, expected):
    wanted = expected(scenario)
    cache = attach(model, layer=layer)
    assert torch.equal(scenario(model, prompts, cache), wanted)
    assert cache.stats.num_dense_calls == 0


def test_exact_share_stays_close(model, prompts, expected):
    """exact:0.01 reads less than dense and still decodes this prompt alike."""
    greedy = SCENARIOS[0]
    wanted = expected(greedy)
    cache = attach(model, layer=lambda _: LouverAttention("exact:0.01", config=SketchConfig(frame_len=32)))
    assert torch.equal(greedy(model, prompts, cache), wanted)
    assert cache.summary().bytes_fraction < 0.8
    assert cache.summary().coarse_fraction > 0


def test_64_steps_are_the_same_from_every_store(model, prompts, tmp_path):
    """And from a file: half of the steps, saved, the other half in a cache that maps it."""
    text = prompts.rows[0].repeat(4)[None]

    def greedy(cache, inputs, steps):
        return generate(model, {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, cache, steps)

    device = greedy(attach(model, policy="exact:0.01"), text, 64)
    assert torch.equal(greedy(attach(model, policy="exact:0.01", store="host"), text, 64), device)
    disk = attach(model, policy="exact:0.01", store="disk", path=tmp_path)
    half = greedy(disk, text, 32)
    disk.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config, store="disk", path=tmp_path)
    assert torch.equal(greedy(loaded, half, 32), device)
    assert torch.equal(greedy(disk, half, 32), device)
    assert loaded.summary().coarse_fraction > 0
