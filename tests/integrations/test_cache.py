"""LouverCache as an object: what it says, what it holds, whom it tells, and that copies are independent."""

import copy

import pytest
import torch
from transformers import DynamicCache

from integrations.scenarios import as_argument, generate
from integrations.tiny_models import gemma3, llama
from louver.attention import DenseAttention, LouverAttention
from louver.errors import PolicyError
from louver.experiments.audit import Audit
from louver.integrations.transformers import LouverCache, attach
from louver.integrations.transformers.layer import layer_of
from louver.kernels import crossover
from louver.policies import DEFAULT_POLICY
from louver.sketch.layout import SketchConfig


@pytest.fixture
def model():
    return llama()


def short_blocks(policy="exact:0.01"):
    return lambda layer_idx: LouverAttention(policy, config=SketchConfig(frame_len=8))


def test_kwargs_is_the_name_transformers_uses(model):
    cache = attach(model)
    assert cache.kwargs() == as_argument(cache)


def test_serves_full_attention_layers_only():
    model = gemma3()
    cache = attach(model)
    assert [layer.layer_idx for layer in cache.served_layers] == [1, 3]
    assert [type(layer) for layer in cache.layers[::2]] == [
        type(layer) for layer in DynamicCache(config=model.config).layers[::2]
    ]


def test_default_is_louver_with_the_policy(model):
    cache = attach(model, policy="exact:0.05+sinks:4")
    attention = cache.served_layers[0].attention
    assert isinstance(attention, LouverAttention)
    assert cache.policy == attention.policy
    assert attention.policy.spec == "exact:0.05+sinks:4"


def test_the_store_does_not_hold_the_layer(model):
    """The mark is on the view that the model is handed: on the store's own it would make a cycle around all keys."""
    cache = attach(model)
    keys, values = (torch.randn(1, 2, 5, 16) for _ in range(2))
    layer = cache.served_layers[0]
    handed, _ = layer.update(keys, values)
    assert layer_of(handed) is layer and layer_of(layer.attention.store.keys) is None


def test_layer_factory_gets_the_layer_idx():
    seen = []
    LouverCache(gemma3().config, layer=lambda layer_idx: seen.append(layer_idx) or DenseAttention())
    assert seen == [1, 3]


def test_wrong_attention_changes_the_tokens(model, prompts):
    """A control: the comparisons of this folder would notice."""
    expected = generate(model, prompts.single, DynamicCache(config=model.config), 20)
    cache = attach(model, layer=short_blocks("topk:1"))
    assert not torch.equal(generate(model, prompts.single, cache, 20), expected)
    assert cache.summary().dropped_mass_bound_worst > 0


def test_lengths_and_states(model, prompts):
    cache = attach(model)
    assert cache.get_seq_length() == 0
    assert cache.served_layers[0].keys is None and cache.served_layers[0].values is None
    dynamic = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts.left_padded, **cache.kwargs())
        model(**prompts.left_padded, **as_argument(dynamic))
    longest = prompts.left_padded["input_ids"].shape[1]
    assert cache.get_seq_length() == longest
    assert cache.get_mask_sizes(5, 0) == dynamic.get_mask_sizes(5, 0) == (longest + 5, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert all(layer.is_croppable and not layer.is_compileable for layer in cache.layers)
    for ours, theirs in zip(cache.layers, dynamic.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_crop(model, prompts, layer):
    cache = attach(model, layer=layer)
    cache.crop(0)
    cache.crop(-3)  # nothing there yet
    with torch.no_grad():
        model(**prompts.single, **cache.kwargs())
    length, keys = cache.get_seq_length(), cache.layers[0].keys.clone()
    cache.crop(0)
    assert cache.get_seq_length() == length
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    cache.crop(torch.tensor(-3))  # as transformers before 5.18 does
    assert cache.get_seq_length() == length - 3
    torch.testing.assert_close(cache.layers[0].keys, keys[:, :, :-3])
    cache.crop(-1000)
    assert cache.get_seq_length() == 0


def test_reset_gives_a_new_cache(model, prompts, layer):
    cache = attach(model, layer=layer)
    first = generate(model, prompts.single, cache, 8)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.summary().num_steps == 0
    assert cache.memory()["keys_values"] == 0
    generate(model, prompts.left_padded, cache, 4)  # another batch
    cache.reset()
    assert torch.equal(generate(model, prompts.single, cache, 8), first)


def test_a_copy_is_independent(model, prompts, layer):
    seen = []
    cache = attach(model, layer=layer, observer=lambda *step: seen.append(step))
    with torch.no_grad():
        model(**prompts.single, **cache.kwargs())
    twin = copy.deepcopy(cache)
    token = prompts.follow_up[:, :1]
    with torch.no_grad():
        model(token, **twin.kwargs())
    assert twin.get_seq_length() == cache.get_seq_length() + 1
    assert cache.summary().num_steps == 0 and twin.summary().num_steps == len(cache.served_layers)
    assert [step[3] for step in seen] == [layer.attention for layer in twin.served_layers]  # told of the copy's layers
    assert twin.observer is cache.observer


def test_observer_sees_every_decode_step(model, prompts):
    steps = []
    cache = attach(model, layer=short_blocks())
    cache.observer = lambda *step: steps.append(step)
    generate(model, prompts.left_padded, cache, 5)
    assert [step[0] for step in steps] == [0, 1] * 4  # the prompt gives the first token
    layer_idx, q, result, attention, softmax_scale = steps[-1]
    assert attention is cache.served_layers[layer_idx].attention
    assert q.shape == (3, 4, 64) == result.out.shape
    assert softmax_scale == pytest.approx(64**-0.5)
    assert result.exact_mask.shape == (3, 4, cache.get_seq_length())

    cache.observer = None
    cache.reset()
    generate(model, prompts.left_padded, cache, 2)
    assert len(steps) == 8
    assert not cache.served_layers[0].attention.record


@pytest.mark.parametrize("spec", ["topk:4", "error:0.2"])
@pytest.mark.parametrize("dispatch", [False, True], ids=["sketch", "dense below the crossover"])
def test_observer_sees_each_of_several_tokens(model, prompts, dispatch, spec, monkeypatch):
    """Its audit finds every promise kept, against the tokens each of them may see."""
    monkeypatch.setattr(crossover, "enabled", dispatch)
    cache, audit = attach(model, layer=short_blocks(spec)), Audit(drops=spec == "topk:4")
    with torch.no_grad():
        model(**prompts.single, **cache.kwargs())
        cache.observer = audit
        model(prompts.follow_up, **cache.kwargs())
    length, new = cache.get_seq_length(), prompts.follow_up.shape[1]
    assert len(audit.steps) == 2 * new
    assert [step.counts["keys"] for step in audit.steps[:new]] == [2 * n for n in range(length - new + 1, length + 1)]
    assert all(step.num_false_negatives == step.num_bound_violations == 0 for step in audit.steps)


def test_an_observer_survives_reset(model, prompts):
    results = []
    cache = attach(model, layer=short_blocks(), observer=lambda _, q, result, *rest: results.append(result))
    cache.reset()
    generate(model, prompts.single, cache, 3)
    assert results[0].exact_mask is not None


def test_memory(model, prompts):
    cache = attach(model, layer=short_blocks(), reserve_tokens=64)
    generate(model, prompts.single, cache, 4)
    memory = cache.memory()
    held = 2 * 2 * 2 * cache.get_seq_length() * 64 * 4  # layers, keys and values, heads, tokens, head_dim, bytes
    assert held <= memory["keys_values"] <= 2 * held
    assert memory["index"] > 0 and memory["other_layers"] == 0
    assert memory["total"] == memory["keys_values"] + memory["index"]


def test_memory_of_sliding_layers(prompts):
    model = gemma3()
    cache = attach(model, layer=lambda layer_idx: DenseAttention())
    generate(model, prompts.single, cache, 4)
    assert cache.memory()["other_layers"] >= 2 * 2 * 2 * 7 * 64 * 4


def test_reserve_tokens_allocates_once(model, prompts):
    cache = attach(model, policy="dense", reserve_tokens=100)
    generate(model, prompts.single, cache, 4)
    before = cache.memory()["keys_values"]
    assert before == 2 * 2 * 2 * 100 * 64 * 4
    generate(model, {"input_ids": torch.full((1, 90), 5)}, cache, 4)
    assert cache.memory()["keys_values"] == before


def test_inference_mode_and_no_grad_mix(model, prompts, layer):
    """Buffers made under inference_mode must stay writable outside of it."""
    expected = generate(model, prompts.single, DynamicCache(config=model.config), 24)
    cache = attach(model, layer=layer)
    with torch.inference_mode():
        some = generate(model, prompts.single, cache, 10)
    more = generate(model, {"input_ids": some}, cache, 6)
    with torch.inference_mode():
        tokens = generate(model, {"input_ids": more}, cache, 8)
    assert torch.equal(tokens, expected)


@pytest.mark.slow
def test_compiled_model(prompts):
    """torch.compile breaks its graph at the cache; the tokens stay."""
    model = llama(num_hidden_layers=1)
    expected = generate(model, prompts.single, DynamicCache(config=model.config), 6)
    cache = attach(model, layer=short_blocks("exact:1.0"))
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, prompts.single, cache, 6), expected)
    assert cache.summary().num_steps == 5


def test_repr(model, prompts):
    cache = attach(model, layer=short_blocks("exact:0.1"))
    assert repr(cache).startswith("LouverCache(layers of your own, serves 2 of 2 layers, 0 tokens")
    assert "no decode step yet" in repr(cache.stats)
    generate(model, prompts.single, cache, 4)
    assert "of dense bytes" in repr(cache) and "relative certificate" in repr(cache.stats)
    assert repr(attach(model)).startswith(f"LouverCache({DEFAULT_POLICY}, ")
    assert repr(cache.layers[0]) == f"LouverLayer(0, LouverAttention, {cache.get_seq_length()} tokens)"


@pytest.mark.parametrize("index", ["ball", "flat"])
def test_other_indexes_serve_retrieval(model, prompts, index):
    """With every key kept, whatever finds them decodes the tokens of dense attention."""
    expected = generate(model, prompts.single, DynamicCache(config=model.config), 12)
    cache = attach(model, policy="budget:1", index=index)
    assert torch.equal(generate(model, prompts.single, cache, 12), expected)
    assert type(cache.served_layers[0].attention.index).__name__.lower() == f"{index}index"


def test_a_policy_that_drops_nothing_needs_the_sketch(model):
    with pytest.raises(PolicyError, match="index='ball' has not"):
        attach(model, policy="exact:0.01", index="ball")
