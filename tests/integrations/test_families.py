"""Models built in other ways: fused projections, no rotary positions, linear attention, shared keys, an image tower."""

import pytest
import torch
import transformers as tf

from integrations.scenarios import as_argument, beams, greedy, left_padded_batch
from integrations.tiny_models import SHAPE
from louver.attention import LouverAttention
from louver.errors import LouverWarning
from louver.integrations.transformers import attach
from louver.sketch.layout import SketchConfig

SHAPE = SHAPE | {"num_hidden_layers": 2}
SLIDING = {"num_hidden_layers": 4, "sliding_window": 8}
LINEAR = {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SHARED = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "intermediate_size": [64] * 6,
    "activation_sparsity_pattern": [0.0] * 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.15, "eos_token_id": None}

# name -> (model, served layers, attention calls per decode step)
MODELS = {
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, bos_token_id=1, pad_token_id=0)), 2, 2),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SHAPE)), 2, 2),
    "granite": (lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SHAPE, attention_multiplier=0.2)), 2, 2),
    "cohere2": (lambda: tf.Cohere2ForCausalLM(tf.Cohere2Config(**SHAPE | SLIDING)), 1, 1),
    "qwen3_next": (lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**SHAPE | LINEAR)), 1, 1),
    "gemma3n": (lambda: tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**SHAPE | SHARED)), 2, 3),
}


def short_blocks(layer_idx: int) -> LouverAttention:
    return LouverAttention("exact:1.0", config=SketchConfig(frame_len=8))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_sdpa(name, prompts):
    build, num_served, num_calls = MODELS[name]
    model = build().eval()
    for scenario in (greedy, left_padded_batch, beams):
        model.set_attn_implementation("sdpa")
        expected = scenario(model, prompts, tf.DynamicCache(config=model.config))
        cache = attach(model, layer=short_blocks)
        tokens = scenario(model, prompts, cache)
        assert torch.equal(tokens, expected)
        assert len(cache.served_layers) == num_served
        assert cache.stats.num_dense_calls == 0
    steps = tokens.shape[1] - prompts.single["input_ids"].shape[1] - 1
    assert cache.summary().num_steps == steps * num_calls


def test_values_that_the_model_changes_are_attended_as_it_passes_them(prompts):
    """DiffLlama attends the same keys twice, with each half of the values repeated: not what the cache holds."""
    model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SHAPE)).eval()
    ids = prompts.single["input_ids"]
    expected = logits_one_by_one(model, tf.DynamicCache(config=model.config), ids)
    cache = attach(model, layer=short_blocks)
    with pytest.warns(LouverWarning, match="changes the keys or values"):
        found = logits_one_by_one(model, cache, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.summary().num_steps == 0


def test_a_model_without_sdpa_keeps_its_attention(prompts):
    """GIT's text decoder is eager only, and takes masks in another form, though its vision tower asks the interface."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
    }
    model = tf.GitForCausalLM(
        tf.GitConfig(vision_config=vision, **text, initializer_range=0.15, eos_token_id=None)
    ).eval()
    expected = greedy(model, prompts, tf.DynamicCache(config=model.config))
    with pytest.warns(LouverWarning, match="attended densely"):
        cache = attach(model, layer=short_blocks)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(greedy(model, prompts, cache), expected)


def logits_one_by_one(model, cache, ids):
    """Logits after a prompt, all but the last 6 tokens, and after each of those."""
    chunks = [ids[:, :-6], *ids[:, -6:].split(1, 1)]
    with torch.no_grad():
        return torch.cat([model(chunk, **as_argument(cache), use_cache=True).logits for chunk in chunks], 1)


def test_only_the_text_decoder_of_a_multimodal_model_is_attached(prompts):
    text = tf.Gemma3TextConfig(**SHAPE, layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation("sdpa")
    expected = greedy(model, prompts, tf.DynamicCache(config=model.config))
    cache = attach(model, layer=short_blocks)
    assert torch.equal(greedy(model, prompts, cache), expected)
    assert model.config.text_config._attn_implementation == "louver"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert cache.summary().num_steps == 19
