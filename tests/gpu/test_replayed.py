"""Single-token steps replayed from CUDA graphs against the same steps launched."""

import gc
import math
import random
import threading

import pytest
import torch

from louver.attention import LouverAttention
from louver.attention.replayed import ReplayedSteps
from louver.integrations.transformers import attach
from louver.kernels import crossover
from louver.kernels.triton import crossover as costs
from louver.kernels.triton import graphs

pytestmark = pytest.mark.gpu

POLICIES = ["exact:0.05", "exact:0.05+sinks:4+recent:32", "budget:0.05", "topk:20", "mass:0.1", "relative:4", "error:0.2", "sample-budget:0.1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_dispatch():
    with crossover.switched(False):
        yield


def launched(policy, **options):
    """A layer that never replays: another backend's graphs, which there are none of."""
    layer = LouverAttention(policy, **options)
    layer._replayed = ReplayedSteps("reference")
    return layer


class Twins:
    """A replayed layer and a launched one that are told the same."""

    def __init__(self, policy, batch=2, prompt=1000, heads=(8, 2), dim=64, seed=0):
        self.random, self.batch, self.heads, self.dim = torch.Generator("cuda").manual_seed(seed), batch, heads, dim
        self.one, self.other = LouverAttention(policy), launched(policy)
        self.handed_out, self.kv_start = [], None
        self.append(prompt)
        queries = self.draw(batch, heads[0], prompt, dim)
        self.both("observe", queries, None, dim**-0.5)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.random, device="cuda").half()

    def append(self, tokens):
        keys, values = (self.draw(self.batch, self.heads[1], tokens, self.dim) for _ in range(2))
        mine, others = self.one.append(keys, values), self.other.append(keys, values)
        assert all(torch.equal(a[:, :, -tokens:], b[:, :, -tokens:]) for a, b in zip(mine, others, strict=True))

    def attend(self):
        q = 2 * self.draw(self.batch, self.heads[0], self.dim)
        results = [layer.attend(q, self.dim**-0.5, self.kv_start) for layer in (self.one, self.other)]
        self.handed_out.append(results)

    def steps(self, count):
        for _ in range(count):
            self.append(1)
            self.attend()

    def both(self, name, *args):
        for layer in (self.one, self.other):
            getattr(layer, name)(*args)

    def check(self):
        """All results at once, and only now: a replay would have written over what it had handed out."""
        for one, other in self.handed_out:
            same(one, other)
        for a, b in zip(self.one.held, self.other.held, strict=True):
            assert torch.equal(a, b)
        self.handed_out.clear()


def same(one, other):
    assert torch.equal(one.tau, other.tau)
    assert torch.equal(one.stats.table, other.stats.table)
    assert (one.stats.index_bytes is None) == (other.stats.index_bytes is None)
    if one.stats.index_bytes is not None:
        assert torch.equal(one.stats.index_bytes, other.stats.index_bytes)
    # Programs meet in an order of their own, so sums of float32 differ between two launched steps, too.
    torch.testing.assert_close(one.out, other.out, rtol=2e-3, atol=1e-3)
    for name in ("lse", "certificate", "arithmetic_bound", "dropped_mass_bound"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_over_blocks_growth_and_lengths_at_which_the_host_decides_anew(policy):
    twins = Twins(policy)
    twins.steps(300)  # from 1,000 tokens: blocks fill at 1,024, 1,152 and 1,280, the buffers grow at 1,280
    assert twins.one._replayed._attending.held is not None
    twins.check()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_in_between(seed):
    policy = ["exact:0.05", "topk:20", "mass:0.1"][seed]
    twins, dice = Twins(policy, seed=seed), random.Random(seed)
    for _ in range(25):
        twins.steps(dice.randrange(8))
        what = dice.randrange(7)
        if what == 0:
            twins.both("truncate", dice.randrange(700, twins.one.kv_len))
        elif what == 1:
            ids = torch.tensor([dice.randrange(twins.batch) for _ in range(dice.randrange(1, 4))], device="cuda")
            twins.both("select_batch", ids)
            twins.batch, twins.kv_start = len(ids), None if twins.kv_start is None else twins.kv_start[ids]
        elif what == 2:
            twins.append(dice.randrange(2, 200))
        elif what == 3:
            twins.append(1)
        elif what == 4:
            twins.one.record = twins.other.record = dice.random() < 0.3
        elif what == 5:
            gc.collect(), torch.cuda.empty_cache()
        else:
            start = torch.tensor([dice.randrange(99) for _ in range(twins.batch)], dtype=torch.int32, device="cuda")
            twins.both("observe", twins.draw(twins.batch, twins.heads[0], 1, twins.dim), start, twins.dim**-0.5)
            twins.kv_start = start
        if dice.random() < 0.5:
            twins.attend()  # the same tokens once more, or what is left of them
        twins.steps(4)
    twins.check()


@pytest.mark.parametrize("policy", ["exact:0.05", "budget:0.05"])
def test_over_the_length_up_to_which_a_step_is_dense(policy, monkeypatch):
    monkeypatch.setattr(costs, "is_short", lambda kind, rows, tokens, group, head_dim: tokens <= 1024)
    with crossover.switched(True):
        twins = Twins(policy, prompt=1010, batch=1)
        twins.steps(40)
    read = [one.stats.num_scanned.sum() for one, _ in twins.handed_out]
    assert read[0] == 2 * 1011
    assert read[-1] < 2 * 1050
    twins.check()


def test_on_a_stream_of_ones_own():
    stream, twins = torch.cuda.Stream(), Twins("exact:0.05")
    twins.steps(10)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        twins.steps(10)
    torch.cuda.current_stream().wait_stream(stream)
    twins.steps(10)
    assert twins.one._replayed._attending.held is not None
    twins.check()


def test_graphs_of_a_place_share_memory_and_give_it_back():
    def rounds(count):
        layers = [LouverAttention("exact:0.05") for _ in range(count)]
        tokens = torch.randn(1, 8, 30000, 128, device="cuda").half()
        for layer in layers:
            layer.append(tokens, tokens)
        for i in range(6):
            for layer in layers:
                layer.append(tokens[:, :, :1], tokens[:, :, :1])
                layer.attend(tokens[:, :1].expand(1, 32, -1, -1)[:, :, 0], 0.1)
            if i == 1:  # launched so far
                before = torch.cuda.memory_reserved()
        assert all(layer._replayed._attending.held is not None for layer in layers)
        return torch.cuda.memory_reserved() - before

    rounds(1)
    gc.collect(), torch.cuda.empty_cache()
    assert not graphs._pools
    one = rounds(1)
    gc.collect(), torch.cuda.empty_cache()
    assert rounds(8) < one + (16 << 20)


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=2, initializer_range=0.1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().cuda().half()


def prompted(model, policy, make=LouverAttention, seed=1):
    cache = attach(model, layer=lambda _: make(policy))
    ids = torch.randint(2, 128, (2, 700), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    with torch.no_grad():
        model(ids, **cache.kwargs())
    return cache


def decoded(model, cache, tokens):
    with torch.no_grad():
        return torch.stack([model(t[:, None], **cache.kwargs()).logits[:, -1] for t in tokens.unbind(1)], 1)


def drawn(count, seed=2):
    return torch.randint(2, 128, (2, count), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize("policy", ["exact:0.05", "topk:50", "dense"])
def test_a_model_with_two_caches_in_turn(model, policy):
    tokens = drawn(90)
    caches = [prompted(model, policy, seed=i) for i in range(2)]
    twins = [prompted(model, policy, launched, seed=i) for i in range(2)]
    for some in tokens.split(30, 1):
        for cache, twin in zip(caches, twins, strict=True):
            got, want = decoded(model, cache, some), decoded(model, twin, some)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
            cache.crop(-5), twin.crop(-5)
    for cache, twin in zip(caches, twins, strict=True):
        got, want = cache.summary(), twin.summary()
        assert (got.num_steps, got.num_keys, got.bytes_dense) == (want.num_steps, want.num_keys, want.bytes_dense)
        assert got.bytes_read == pytest.approx(want.bytes_read, rel=0.02)


def test_beams_and_assisted_decoding(model):
    """Rows rearranged, and tokens verified several at a time and taken back, between replays."""
    ids = drawn(600, seed=4)[:1]
    ids = torch.cat([ids, ids[:, :300]], 1)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        both = [attach(model, layer=lambda _, make=make: make("exact:0.3")) for make in (LouverAttention, launched)]
        tokens = [
            model.generate(ids, **cache.kwargs(), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0, **options)
            for cache in both
        ]  # fmt: skip
        assert (tokens[0] == tokens[1]).float().mean() > 0.95
        assert both[0].summary().num_steps == pytest.approx(both[1].summary().num_steps, rel=0.2)


def test_threads_that_draw_tokens_while_others_capture(model):
    """Each with a cache of its own; a capture by torch.cuda.CUDAGraph would break the generators of the others."""
    policies, got, failed = ["exact:0.05", "topk:50"], {}, []

    def run(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(3):
                    cache, tokens = prompted(model, policies[i]), drawn(60)
                    logits = []
                    for token in tokens.split(1, 1):
                        logits.append(decoded(model, cache, token))
                        torch.multinomial(logits[-1][:, 0].float().softmax(-1), 1)
                    got[i, turn] = torch.cat(logits, 1)
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for (i, _), logits in got.items():
        want = decoded(model, prompted(model, policies[i], launched), drawn(60))
        torch.testing.assert_close(logits, want, rtol=2e-2, atol=2e-2)


def test_within_somebodys_own_capture_steps_are_launched(model):
    twins = Twins("exact:0.05", batch=1)
    twins.steps(8)
    q = twins.draw(1, 8, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = twins.one.attend(q, 0.125)
    graph.replay()
    want = twins.other.attend(q, 0.125)
    assert torch.equal(captured.tau, want.tau)
    twins.steps(4)
    twins.check()


def test_inference_mode_and_back():
    twins = Twins("exact:0.05")
    with torch.inference_mode():
        twins.steps(10)
    twins.steps(10)
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 1, 128), (3, 2, 1, 64), (1, 1, 1, 1), (2, 3, 5, 7)])
def test_copies_of_whatever_lies_anywhere(dtype, shape):
    """Two tensors or one, contiguous or not, aligned or not."""
    copy = graphs.copying(graphs.place(torch.device("cuda", torch.cuda.current_device())))
    size = math.prod(shape)
    for how in ("plain", "shifted", "turned", "negative"):
        given = []
        for _ in range(2):
            x = torch.randn(size + 1, device="cuda").to(dtype)
            x = {
                "plain": x[:-1].view(shape),
                "shifted": x[1:].view(shape),
                "turned": x[:-1].view(shape[::-1]).permute(3, 2, 1, 0),
                "negative": torch._neg_view(x[:-1]).view(shape),
            }[how]
            given.append(x)
        into = [torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(3)]
        copy(into[:2], given)
        copy(into[2:], given[1:])
        assert torch.equal(into[0], given[0]) and torch.equal(into[1], given[1]) and torch.equal(into[2], given[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("current", [0, 1])
def test_on_a_card_that_is_not_the_current_one(current, own_stream):
    home, before = torch.device("cuda:1"), torch.cuda.current_device()
    random = torch.Generator(home).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, device=home).half()

    try:
        with torch.cuda.stream(torch.cuda.Stream(home) if own_stream else None):
            torch.cuda.set_device(current)
            one, other = LouverAttention("exact:0.05"), launched("exact:0.05")
            prompt, queries = draw(2, 2, 1000, 64), draw(2, 8, 1000, 64)
            for x in (one, other):
                x.append(prompt, prompt)
                x.observe(queries, None, 0.125)
            for step in range(300):
                if step % 50 == 49:
                    torch.cuda.set_device(1 - torch.cuda.current_device())  # the same place for the layer
                new, q = draw(2, 2, 1, 64), 2 * draw(2, 8, 64)
                for x in (one, other):
                    x.append(new, new)
                a, b = (x.attend(q, 0.125) for x in (one, other))
                assert torch.equal(a.tau, b.tau) and torch.equal(a.stats.table, b.stats.table)
                torch.testing.assert_close(a.out, b.out, rtol=2e-3, atol=1e-3)
            held = one._replayed
            assert held._appending.held is not None and held._attending.held is not None
            assert held._attending.key.at.device == 1
    finally:
        torch.cuda.set_device(before)
