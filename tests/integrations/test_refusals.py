"""What cannot be served exactly is refused in one sentence; what is merely not served is said once."""

import warnings

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

from integrations.scenarios import generate
from integrations.tiny_models import SHAPE, llama
from louver.errors import BackendError, LouverWarning, PolicyError, UnsupportedModelError
from louver.integrations.transformers import LouverCache, attach


def one_sentence(refusal) -> str:
    """The message, which a person can read in one breath."""
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 200
    return message


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def ids(prompts):
    return prompts.single["input_ids"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(), "soft-caps"),
        (DeepseekV3Config(), "MLA"),
        (T5Config(), "cross-attention"),
        (FalconConfig(alibi=True), "ALiBi"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_refuses_by_config(config, reason):
    with pytest.raises(UnsupportedModelError) as refusal:
        LouverCache(config)
    assert reason in one_sentence(refusal)


def test_refuses_learned_sinks():
    model = GptOssForCausalLM(GptOssConfig(**SHAPE, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(model)
    assert "s_aux" in one_sentence(refusal)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_refuses_by_call(argument, model, ids):
    """The safety net for a model whose config does not give it away."""
    cache = attach(model)
    with pytest.raises(UnsupportedModelError) as refusal, torch.no_grad():
        model(ids, **cache.kwargs(), **{argument: torch.ones(1)})
    assert "LlamaAttention" in one_sentence(refusal)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_refuses_another_cache_by_default(implementation, model):
    model.generation_config.cache_implementation = implementation
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(model)
    assert implementation in one_sentence(refusal)


def test_refuses_training(model, ids):
    cache = attach(model)
    with pytest.raises(UnsupportedModelError) as refusal:
        model(ids, **cache.kwargs())
    assert "no_grad" in one_sentence(refusal)


def test_refuses_dropout(ids):
    model = llama(attention_dropout=0.5)
    cache = attach(model)
    model.train()
    with pytest.raises(UnsupportedModelError) as refusal, torch.no_grad():
        model(ids, **cache.kwargs())
    assert "model.eval()" in one_sentence(refusal)


def test_trains_without_its_cache(model, ids):
    attach(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_refuses_attention_weights(model, ids):
    cache = attach(model)
    with pytest.raises(UnsupportedModelError) as refusal, torch.no_grad():
        model(ids, output_attentions=True, **cache.kwargs())
    assert "output_attentions" in one_sentence(refusal)


def test_refuses_attention_weights_by_config(model):
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(model)
    assert "output_attentions" in one_sentence(refusal)


def test_refuses_values_of_another_width(model):
    layer = LouverCache(model.config).layers[0]
    with pytest.raises(UnsupportedModelError) as refusal:
        layer.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 32))
    assert "head_dim=64" in one_sentence(refusal)


def test_refuses_what_is_no_model():
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(torch.nn.Linear(2, 2))
    assert "Linear" in one_sentence(refusal)


def test_refuses_unknown_policy_and_backend(model):
    with pytest.raises(PolicyError, match="unknown policy 'everything'"):
        attach(model, policy="everything")
    with pytest.raises(BackendError, match="abacus"):
        attach(model, backend="abacus")


def test_a_refused_model_keeps_its_attention():
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(PolicyError):
        attach(model, policy="everything")
    assert model.config._attn_implementation == before


def test_warns_when_the_model_has_its_own_attention(ids):
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=2)).eval()
    expected = generate(model, {"input_ids": ids}, DynamicCache(config=model.config), 6)
    with pytest.warns(LouverWarning, match="does not use transformers' attention interface"):
        cache = attach(model)
    with warnings.catch_warnings():  # it has been said
        warnings.simplefilter("error")
        tokens = generate(model, {"input_ids": ids}, cache, 6)
    assert torch.equal(tokens, expected)
    assert cache.summary().num_steps == 0


def test_warns_when_the_model_is_not_attached(model, ids):
    cache = LouverCache(model.config)
    with pytest.warns(LouverWarning, match="attach") as caught:
        generate(model, {"input_ids": ids}, cache, 6)
    assert len(caught) == 1
    assert cache.summary().num_steps == 0


def test_warns_when_there_is_nothing_to_serve():
    model = MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=1, sliding_window=8))
    with pytest.warns(LouverWarning, match="no layer with full attention"):
        cache = attach(model)
    assert cache.served_layers == []


@pytest.mark.parametrize("implementation", [None, "static"])
def test_another_cache_is_attended_densely(implementation, model, prompts):
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": implementation}
    expected = model.generate(**prompts.left_padded, **options)
    attach(model)
    assert torch.equal(model.generate(**prompts.left_padded, **options), expected)
