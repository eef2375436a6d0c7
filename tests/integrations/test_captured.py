"""The steps that CapturedDecoding captures, launched without a graph on the CPU: the same as a model's usual steps, bit for bit."""

from types import ModuleType

import pytest
import torch

from integrations.scenarios import as_argument
from integrations.tiny_models import gemma3, llama
from louver.attention import LouverAttention
from louver.errors import OutOfRoomError, PolicyError, UnsupportedModelError
from louver.integrations.transformers import CapturedDecoding, attach, captured
from louver.integrations.transformers.padding import NO_PADDING
from louver.kernels import crossover
from louver.kv.clock import Clock
from louver.sketch.layout import SketchConfig


def prompted(model, policy, batch=2, prompt=61, reserve_tokens=160, **options):
    """A cache of blocks of 8 tokens that holds a prompt."""
    config = SketchConfig(frame_len=8)
    cache = attach(
        model, layer=lambda _: LouverAttention(policy, config=config, reserve_tokens=reserve_tokens, **options)
    )
    ids = torch.randint(2, 128, (batch, prompt), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, **as_argument(cache))
    return cache


def usual(model, cache, tokens):
    with torch.no_grad():
        return [model(t[:, None], **as_argument(cache)).logits[:, -1] for t in tokens.unbind(1)]


@pytest.mark.parametrize(
    "policy", ["exact:0.05", "exact:0.1+sinks:2+recent:5", "topk:5", "budget:0.05", "fixed:3", "dense"]
)
def test_steps_are_the_usual_ones(policy):
    """Over blocks that fill, a crop, and going on in both ways in turn."""
    model = llama()
    tokens = torch.randint(2, 128, (2, 60), generator=torch.Generator().manual_seed(2))
    with crossover.switched(False):
        one, other = prompted(model, policy), prompted(model, policy)
        want = usual(model, one, tokens[:, :30])
        one.crop(-9)
        want += usual(model, one, tokens[:, 30:])
        decoding = CapturedDecoding(model, other, graph=False)
        got = [decoding(t).clone() for t in tokens[:, :30].unbind(1)]
        other.crop(-9)
        got += [decoding(t).clone() for t in tokens[:, 30:40].unbind(1)]
        got += usual(model, other, tokens[:, 40:45])
        got += [decoding(t).clone() for t in tokens[:, 45:].unbind(1)]
    assert other.get_seq_length() == one.get_seq_length() == 61 + 60 - 9
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-5, atol=1e-5 if policy == "dense" else 0)
    counts = [None if step is None else step.counts[..., 0].unique().tolist() for step in decoding.evidence]
    assert counts == [None if policy == "dense" else [112]] * 2


@pytest.mark.parametrize("policy", ["exact:0.05", "dense"])
def test_kernels_get_a_query_whose_memory_holds_its_own_sign(policy):
    """What ``z.conj().imag`` is holds the other one, and a captured kernel reads memory."""
    cache = prompted(llama(), policy)
    layer = captured._CapturedLayer(cache.served_layers[0], clock := Clock(2, torch.device("cpu")))
    clock.set(61)
    layer.encodes, seen = False, []
    q = torch.randn(2, 4, layer.attention.store.keys.shape[3], generator=torch.Generator().manual_seed(2))
    ops = layer._ops

    class Watched(ModuleType):
        def __getattr__(self, name):
            def op(q, *rest, **more):
                seen.append(q.is_neg())
                return getattr(ops, name)(q, *rest, **more)

            return op

    want = layer.attend(q, NO_PADDING, 0.3).clone()
    layer._ops = Watched("watched")
    assert torch.equal(layer.attend(torch._neg_view(-q), NO_PADDING, 0.3), want)
    assert seen == [False]


def test_a_reset_cache_is_captured_anew():
    model, tokens = llama(), torch.randint(2, 128, (2, 4), generator=torch.Generator().manual_seed(2))
    with crossover.switched(False):
        one, other = prompted(model, "exact:0.05"), prompted(model, "exact:0.05", prompt=30)
        decoding = CapturedDecoding(model, other, graph=False)
        decoding(tokens[:, 0])
        other.reset()
        ids = torch.randint(2, 128, (2, 61), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(ids, **as_argument(other))
        got = [decoding(t).clone() for t in tokens.unbind(1)]
        assert torch.equal(torch.stack(got), torch.stack(usual(model, one, tokens)))
    assert other.get_seq_length() == 65


def test_a_row_without_padding_of_a_padded_batch():
    model, mask = llama(), torch.ones(2, 61, dtype=torch.long)
    mask[0, :5] = 0
    ids, token = torch.randint(2, 128, (2, 61), generator=torch.Generator().manual_seed(1)), torch.tensor([5])
    caches = [prompted(model, "topk:5"), prompted(model, "topk:5")]
    with crossover.switched(False):
        for cache in caches:
            cache.reset()
            with torch.no_grad():
                model(ids, attention_mask=mask, **as_argument(cache))
            cache.batch_select_indices(torch.tensor([1]))
        got = CapturedDecoding(model, caches[0], graph=False)(token)
        assert torch.equal(got, usual(model, caches[1], token[:, None])[0])
    assert caches[1].stats.num_dense_calls == 0


def test_generate_is_greedy():
    model, first = llama(), torch.tensor([5, 9])
    with crossover.switched(False):
        chosen = CapturedDecoding(model, prompted(model, "exact:0.05"), graph=False).generate(first, 12)
        logits = usual(model, prompted(model, "exact:0.05"), torch.cat([first[:, None], chosen[:, :-1]], 1))
    assert torch.equal(torch.stack(logits, 1).argmax(-1), chosen)


def test_room_ends():
    model, token = llama(), torch.tensor([5, 9])
    decoding = CapturedDecoding(model, prompted(model, "exact:0.05", reserve_tokens=64), graph=False)
    for _ in range(3):
        decoding(token)
    with pytest.raises(OutOfRoomError, match="64 reserved tokens"):
        decoding(token)


def test_refusals():
    model = llama()
    with pytest.raises(PolicyError, match="without the host"):
        CapturedDecoding(model, prompted(model, "relative:8"), graph=False)
    with pytest.raises(UnsupportedModelError, match="on the GPU"):
        CapturedDecoding(model, prompted(model, "exact:0.05"))
    sliding = gemma3()
    with pytest.raises(UnsupportedModelError, match="every layer"):
        CapturedDecoding(sliding, prompted(sliding, "exact:0.05"), graph=False)
    padded = attach(model)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        model(torch.ones(2, 20, dtype=torch.long), attention_mask=mask, **as_argument(padded))
    with pytest.raises(UnsupportedModelError, match="padding"):
        CapturedDecoding(model, padded, graph=False)
