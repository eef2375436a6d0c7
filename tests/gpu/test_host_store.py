"""Keys and values in the host's memory, read by the kernels of a real card."""

import copy

import pytest
import torch

from louver import LouverAttention
from louver.errors import OutOfRoomError
from louver.experiments.synthetic import heavy_tailed
from louver.kernels import crossover
from louver.kernels.triton import runtime
from louver.kv import HostStore

pytestmark = pytest.mark.gpu


def tokens(new_len, dtype=torch.float16, batch=2):
    return torch.randn(batch, 2, new_len, 64, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[1] * 70, [63, 1, 1, 64, 17], [0, 1, 300, 3], [5000, 200, 1]])
def test_holds_what_concatenation_holds(lengths, dtype):
    store, keys = HostStore(), []
    for new_len in lengths:
        keys.append(tokens(new_len, dtype))
        store.append(keys[-1], -keys[-1])
        assert torch.equal(store.keys, torch.cat(keys, 2))
    store.settle()
    whole = torch.cat(keys, 2)
    assert torch.equal(store.keys, whole) and torch.equal(store.values, -whole)
    assert store.keys.is_cuda and runtime.in_host_memory(store.keys) and not runtime.in_host_memory(whole)
    store.select_batch(torch.tensor([1, 0, 1]))
    assert torch.equal(store.keys, whole[[1, 0, 1]])
    twin = copy.deepcopy(store)
    twin.append(tokens(1, dtype, 3), tokens(1, dtype, 3))
    twin.keys.zero_()
    assert torch.equal(store.keys, whole[[1, 0, 1]]) and runtime.in_host_memory(twin.keys)


def test_takes_no_memory_of_the_card():
    keys = tokens(20000)
    before = torch.cuda.memory_allocated()
    store = HostStore()
    store.append(keys, keys)
    store.settle()
    store.append(keys[:, :, :1], keys[:, :, :1])
    assert torch.cuda.memory_allocated() - before < 1 << 16
    assert store.memory_bytes() >= 2 * keys.numel() * 2


def test_room_is_refused_before_it_is_taken():
    keys = tokens(5000)
    for store, advice in (("host", "retrieval policy"), ("device", "store='host'")):
        layer = LouverAttention("exact:0.01", store=store, max_gpu_bytes=100_000)
        with pytest.raises(OutOfRoomError, match=advice):
            layer.append(keys, keys)
        assert layer.kv_len == 0


@pytest.mark.parametrize("spec", ["exact:0.01", "budget:0.01", "topk:20", "fixed:30", "dense"])
def test_a_layer_decodes_as_from_the_card(spec, monkeypatch):
    monkeypatch.setattr(crossover, "enabled", False)
    data = heavy_tailed(5003, num_q_heads=8, num_kv_heads=2, dtype=torch.float16, device="cuda")
    results = []
    for store in ("device", "host"):
        layer = LouverAttention(spec, store=store)
        for begin, end in ((0, 3000), (3000, 5000), (5000, 5001), (5001, 5003)):
            layer.append(data.keys[:, :, begin:end], data.values[:, :, begin:end])
            if end - begin > 16:
                layer.observe(data.metric_queries, None, 0.1)
        results.append(layer.attend(data.q, 0.1))
        memory = layer.memory_bytes()
    one, other = results
    assert memory["host"] == memory["keys_values"] and memory["gpu"] == memory["index"]
    torch.testing.assert_close(one.out.float(), other.out.float(), rtol=2e-3, atol=2e-3)
    assert torch.equal(one.stats.table, other.stats.table)


def test_saved_on_the_card_and_opened_on_a_cpu(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from louver.integrations.transformers import LouverCache, attach

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=2, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().cuda()
    cache = attach(model, policy="exact:0.05", store="host")
    prompt = torch.randint(2, 128, (1, 700), device="cuda")

    def step(cache, model, ids):
        with torch.no_grad(), crossover.switched(False):  # or the CPU, and it alone, would attend densely
            return model(ids, **cache.kwargs()).logits[:, -1].cpu()

    step(cache, model, prompt)
    cache.save(tmp_path / "cache")
    here = step(LouverCache.load(tmp_path / "cache", model.config, store="host"), model, prompt[:, :1])
    torch.testing.assert_close(step(cache, model, prompt[:, :1]), here, rtol=1e-3, atol=1e-3)
    loaded = LouverCache.load(tmp_path / "cache", model.config, device="cpu")
    assert loaded.memory()["gpu"] == 0
    model.cpu()
    there = step(loaded, model, prompt[:, :1].cpu())
    # Cuts fall on bins of their own on each backend, so other keys may be read through the sketch: within what the policy costs.
    assert (there - here).norm() < 0.1 * here.norm()


@pytest.mark.model
def test_smollm2_decodes_the_same_tokens_for_64_steps(monkeypatch):
    from louver.experiments import demo_model
    from louver.integrations.transformers import attach

    monkeypatch.setattr(crossover, "enabled", False)
    model, tokenizer = demo_model()
    text = " ".join(f"On day {i} the keeper of the lighthouse counted {i * i % 97} ships." for i in range(150))
    inputs = tokenizer(text, return_tensors="pt").to("cuda")
    tokens = []
    for store in ("device", "host"):
        cache = attach(model, policy="exact:0.01", store=store)
        tokens.append(model.generate(**inputs, **cache.kwargs(), do_sample=False, max_new_tokens=64, min_new_tokens=64))
        assert cache.summary().coarse_fraction > 0
    print(cache)
    assert torch.equal(*tokens)
