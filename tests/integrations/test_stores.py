"""Where a cache's tokens are changes no token; a saved cache goes on as if it had never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.scenarios import SCENARIOS, as_argument, crop_and_regenerate, generate
from integrations.tiny_models import FAMILIES, llama
from louver.attention import DenseAttention, LouverAttention
from louver.errors import CacheFileError, PolicyError
from louver.integrations.transformers import LouverCache, attach
from louver.kv.tensor_file import read_tensors
from louver.sketch.layout import SketchConfig

STORES = ["device", "host", "disk"]
POLICIES = ["exact:0.05", "budget:0.1", "dense"]


def where(store, tmp_path):
    return {"store": store} | ({"path": tmp_path / "work"} if store == "disk" else {})


def short_blocks(policy, **options):
    """A factory of layers whose blocks are short, so that short prompts close some."""
    return lambda _: LouverAttention(policy, config=SketchConfig(frame_len=8), **options)


def step(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, **as_argument(cache)).logits[:, -1]


@pytest.mark.parametrize(("family", "policy", "steps"), [("llama", "exact:0.05", 64), ("gemma3", "budget:0.1", 12)])
def test_64_steps_are_the_same_from_every_store(family, policy, steps, prompts, tmp_path):
    model = FAMILIES[family]()
    tokens = [
        generate(model, prompts.left_padded, attach(model, layer=short_blocks(policy, **where(store, tmp_path))), steps)
        for store in STORES
    ]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("scenario", SCENARIOS[2:], ids=lambda scenario: scenario.__name__)
def test_whatever_one_does_with_it(scenario, prompts, tmp_path):
    model = llama()
    one = scenario(model, prompts, attach(model, layer=short_blocks("exact:0.05")))
    other = scenario(model, prompts, attach(model, layer=short_blocks("exact:0.05", **where("disk", tmp_path))))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [("llama", store, store) for store in STORES] + [("qwen3", "disk", "device"), ("gemma3", "device", "disk")],
)
def test_going_on_from_a_file_is_never_having_stopped(family, before, after, prompts, tmp_path):
    model = FAMILIES[family]()
    cache = attach(model, layer=short_blocks("exact:0.05", **where(before, tmp_path)))
    first = generate(model, prompts.left_padded, cache, 9)
    cache.save(tmp_path / "cache")
    saved = (tmp_path / "cache").read_bytes()
    loaded = LouverCache.load(tmp_path / "cache", model.config, **where(after, tmp_path))

    assert loaded.get_seq_length() == cache.get_seq_length()
    mask = torch.cat([prompts.left_padded["attention_mask"], torch.ones(3, 9, dtype=torch.long)], 1)
    inputs = {"input_ids": first, "attention_mask": mask}
    steps = 64 if (before, after) == ("disk", "disk") else 12
    assert torch.equal(generate(model, inputs, loaded, steps), generate(model, inputs, cache, steps))
    assert loaded.stats.num_dense_calls == 0
    assert [str(p.attention.store.place) for p in loaded.served_layers[:1]] == [after.replace("device", "host")]
    assert (tmp_path / "cache").read_bytes() == saved


@pytest.mark.parametrize("policy", POLICIES)
def test_every_bit_of_the_evidence_is_the_same(policy, prompts, tmp_path):
    model = llama()
    cache = attach(model, policy=policy)
    step(model, cache, torch.randint(2, 128, (1, 380)))
    cache.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config)
    assert loaded.policy.spec == policy and str(policy) in repr(loaded)
    results = []
    for one in (cache, loaded):
        one.observer = lambda _, q, result, *rest: results.append(result)
    for token in torch.randint(2, 128, (10, 1, 1)):  # a block closes on the way
        assert torch.equal(step(model, cache, token), step(model, loaded, token))
        half = len(results) // 2
        for a, b in zip(results[:half], results[half:], strict=True):
            assert torch.equal(a.certificate, b.certificate) and torch.equal(a.stats.table, b.stats.table)
        results.clear()


def test_rearranging_a_loaded_cache(prompts, tmp_path):
    model = llama()
    cache = attach(model, layer=short_blocks("exact:0.05"))
    step(model, cache, prompts.single["input_ids"])
    cache.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config, **where("disk", tmp_path))
    for one in (cache, loaded):
        one.crop(-5)
        one.batch_repeat_interleave(3)
        one.batch_select_indices(torch.tensor([2, 0]))
    two = torch.cat([prompts.follow_up, prompts.follow_up.flip(1)])
    assert torch.equal(step(model, cache, two), step(model, loaded, two))
    loaded.reset()
    assert loaded.get_seq_length() == 0
    fresh = attach(model, layer=short_blocks("exact:0.05"))
    assert torch.equal(crop_and_regenerate(model, prompts, loaded), crop_and_regenerate(model, prompts, fresh))


def test_saving_over_the_file_one_reads_from(prompts, tmp_path):
    model, file = llama(), tmp_path / "cache"
    cache = attach(model, policy="exact:0.05")
    step(model, cache, prompts.single["input_ids"])
    cache.save(file)
    loaded = LouverCache.load(file, model.config, **where("disk", tmp_path))
    loaded.save(file)
    token = prompts.follow_up[:, :1]
    assert torch.equal(step(model, loaded, token), step(model, cache, token))
    loaded.save(file)
    again = LouverCache.load(file, model.config)
    assert torch.equal(step(model, again, token), step(model, cache, token))


@pytest.mark.parametrize(("before", "after"), [("sketch", "flat"), ("flat", "ball"), ("ball", "sketch")])
def test_another_index_takes_over_where_it_is_asked_for(before, after, prompts, tmp_path):
    model = llama()
    cache = attach(model, policy="budget:1", index=before)
    step(model, cache, prompts.left_padded["input_ids"])
    cache.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config, index=after)
    assert type(loaded.served_layers[0].attention.index).__name__.lower() == f"{after}index"
    token = prompts.follow_up[:, :1].expand(3, 1)
    torch.testing.assert_close(step(model, loaded, token), step(model, cache, token), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", ["flat", "ball"])
def test_other_indexes_go_on_too(index, prompts, tmp_path):
    model = llama()
    cache = attach(model, policy="topk:8", index=index)
    first = generate(model, prompts.left_padded, cache, 4)
    cache.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config)
    assert type(loaded.served_layers[0].attention.index) is type(cache.served_layers[0].attention.index)
    mask = torch.cat([prompts.left_padded["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    inputs = {"input_ids": first, "attention_mask": mask}
    assert torch.equal(generate(model, inputs, loaded, 8), generate(model, inputs, cache, 8))


def test_another_policy_may_go_on(prompts, tmp_path):
    model = llama()
    cache = attach(model, policy="exact:0.05")
    step(model, cache, prompts.single["input_ids"])
    cache.save(tmp_path / "cache")
    loaded = LouverCache.load(tmp_path / "cache", model.config, policy="budget:0.5")
    assert loaded.policy.spec == "budget:0.5"
    assert loaded.served_layers[0].attention.policy.spec == "budget:0.5"


def test_the_file_is_canonical(prompts, tmp_path):
    """What a reader in another language would rely on."""
    model = llama()
    cache = attach(model, layer=short_blocks("exact:0.05", reserve_tokens=500))
    step(model, cache, prompts.single["input_ids"])
    cache.save(tmp_path / "cache")
    tensors, facts = read_tensors(tmp_path / "cache", "louver-cache-2")
    kv_len = cache.get_seq_length()
    assert tensors["layers.1.keys"].shape == (1, 2, kv_len, 64)
    assert tensors["layers.0.sketch.key_codes"].shape == (1, 2, kv_len // 8, 8, 32)
    assert json.loads(facts["model"])["num_hidden_layers"] == 2
    assert {"layers.0.kv_start", "layers.0.sketch.metric_weight", "layers.0.sketch.value_mean"} <= tensors.keys()
    held = sum(x.numel() * x.element_size() for x in tensors.values())
    assert held < (tmp_path / "cache").stat().st_size < held + 20_000


def test_memory_names_the_place(prompts, tmp_path):
    model = llama()
    for store in STORES:
        cache = attach(model, policy="exact:0.05", **where(store, tmp_path))
        step(model, cache, torch.randint(2, 128, (1, 300)))
        memory = cache.memory()
        assert memory["gpu"] == 0
        assert memory["disk"] == (memory["keys_values"] if store == "disk" else 0)
        assert memory["host"] + memory["disk"] == memory["total"]
        assert memory["index_fraction"] == memory["index"] / memory["keys_values"] > 0
        assert ("on disk" in repr(cache)) == (store == "disk")


class TestRefusals:
    @pytest.fixture
    def saved(self, prompts, tmp_path):
        model = llama()
        cache = attach(model, policy="exact:0.05")
        step(model, cache, prompts.single["input_ids"])
        cache.save(tmp_path / "cache")
        return tmp_path / "cache", model.config

    def test_nothing_to_save(self, tmp_path):
        with pytest.raises(CacheFileError, match="no tokens"):
            attach(llama()).save(tmp_path / "cache")
        assert not list(tmp_path.iterdir())

    def test_layers_of_ones_own(self, prompts, tmp_path):
        model = llama()
        cache = attach(model, layer=lambda _: DenseAttention())
        step(model, cache, prompts.single["input_ids"])
        with pytest.raises(CacheFileError, match="DenseAttention"):
            cache.save(tmp_path / "cache")

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"num_hidden_layers": 3}, "num_hidden_layers"),
            ({"num_key_value_heads": 4}, "num_key_value_heads"),
            ({"vocab_size": 130}, "vocab_size"),
        ],
    )
    def test_another_model(self, saved, changes, field):
        with pytest.raises(CacheFileError, match=f"another model \\({field}"):
            LouverCache.load(saved[0], llama(**changes).config)

    def test_another_family(self, saved):
        with pytest.raises(CacheFileError, match="another model"):
            LouverCache.load(saved[0], FAMILIES["qwen3"]().config)

    def test_no_file(self, tmp_path):
        with pytest.raises(CacheFileError, match="no such file"):
            LouverCache.load(tmp_path / "none", llama().config)

    def test_a_folder(self, tmp_path):
        with pytest.raises(CacheFileError, match="is no file"):
            LouverCache.load(tmp_path, llama().config)

    def test_truncated(self, saved):
        file, config = saved
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CacheFileError, match="truncated"):
            LouverCache.load(file, config)

    def test_corrupt(self, saved):
        file, config = saved
        data = bytearray(file.read_bytes())
        data[-100] ^= 4
        file.write_bytes(data)
        with pytest.raises(CacheFileError, match="checksum"):
            LouverCache.load(file, config)

    def test_a_file_of_weights(self, saved):
        file, config = saved
        tensors = load_file(file)
        save_file(tensors, file)
        with pytest.raises(CacheFileError, match="louver-cache-2"):
            LouverCache.load(file, config)

    def test_a_store_without_its_path(self, saved):
        with pytest.raises(PolicyError, match="needs path"):
            LouverCache.load(*saved, store="disk")


RESUME = """
import sys, torch
from integrations.tiny_models import llama
from integrations.scenarios import generate
from louver.integrations.transformers import LouverCache, attach
model = llama()
attach(model)
tokens = torch.load(sys.argv[2], weights_only=True)
cache = LouverCache.load(sys.argv[1], model.config)
print(generate(model, {"input_ids": tokens}, cache, 64)[0].tolist())
"""

SAVE_FOREVER = """
import sys, torch
from integrations.tiny_models import llama
from integrations.scenarios import as_argument
from louver.integrations.transformers import attach
model = llama()
cache = attach(model, policy="exact:0.05")
with torch.no_grad():
    model(torch.arange(4000)[None] % 120 + 2, **as_argument(cache))
cache.save(sys.argv[1])
print("saved", flush=True)
while True:
    cache.save(sys.argv[1])
"""


def python(code, *arguments):
    here = Path(__file__).resolve()
    roots = [str(here.parents[2] / "src"), str(here.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_another_process_goes_on(prompts, tmp_path):
    model = llama()
    cache = attach(model, policy="exact:0.05")
    first = generate(model, {"input_ids": torch.randint(2, 128, (1, 300))}, cache, 3)
    cache.save(tmp_path / "cache")
    torch.save(first, tmp_path / "tokens")
    expected = generate(model, {"input_ids": first}, cache, 64)
    out, _ = python(RESUME, tmp_path / "cache", tmp_path / "tokens").communicate(timeout=120)
    assert json.loads(out) == expected[0].tolist()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_killed_while_saving(tmp_path):
    """kill -9 at any moment leaves a file that reads: the one before, or the new one."""
    file = tmp_path / "cache"
    unfinished = 0
    for pause in (0.0, 0.004, 0.03):
        process = python(SAVE_FOREVER, file)
        assert process.stdout.readline() == "saved\n"
        time.sleep(0.05 + pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert LouverCache.load(file, llama().config).get_seq_length() == 4000
        unfinished += sum(path != file for path in tmp_path.iterdir())
    assert unfinished, "no save was interrupted, so nothing was tested"
