"""Decoding as replays of a CUDA graph, against the same cache decoded launch by launch."""

import pytest
import torch

from louver.errors import OutOfRoomError, PolicyError, UnsupportedModelError
from louver.integrations.transformers import CapturedDecoding, attach
from louver.kernels import crossover

pytestmark = pytest.mark.gpu

PROMPT = 700


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().cuda().half()


def prompted(model, policy, reserve_tokens=1100, batch=2):
    cache = attach(model, policy=policy, reserve_tokens=reserve_tokens)
    ids = torch.randint(2, 128, (batch, PROMPT), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        model(ids, **cache.kwargs())
    return cache


def eager(model, cache, tokens):
    with torch.no_grad():
        return torch.stack([model(t[:, None], **cache.kwargs()).logits[:, -1] for t in tokens.unbind(1)], 1)


@pytest.mark.parametrize(
    "policy",
    [
        "exact:0.05",
        "exact:0.05+sinks:4+recent:32",
        "topk:50",
        "mass:0.05",
        "relative:5",
        "error:0.1",
        "sample-budget:0.3",
        "dense",
    ],
)
def test_replays_give_the_logits_of_the_usual_steps(model, policy):
    """Over two blocks that fill, a crop, and going on in both ways in turn."""
    tokens = torch.randint(2, 128, (2, 300), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    with crossover.switched(False):
        usual, cache = prompted(model, policy), prompted(model, policy)
        want = eager(model, usual, tokens[:, :100])
        usual.crop(-40)
        want = torch.cat([want, eager(model, usual, tokens[:, 100:])], 1)
        decoding = CapturedDecoding(model, cache)
        got = [decoding(t).clone() for t in tokens[:, :100].unbind(1)]
        cache.crop(-40)
        got += [decoding(t).clone() for t in tokens[:, 100:150].unbind(1)]
        got += eager(model, cache, tokens[:, 150:160]).unbind(1)
        got += [decoding(t).clone() for t in tokens[:, 160:].unbind(1)]
    assert cache.get_seq_length() == PROMPT + 260
    torch.testing.assert_close(torch.stack(got, 1), want, rtol=2e-2, atol=2e-2)
    for layer, twin in zip(cache.served_layers, usual.served_layers, strict=True):
        assert torch.equal(layer.keys[:, :, :PROMPT], twin.keys[:, :, :PROMPT])
        if policy != "dense":
            assert torch.equal(layer.attention.index.sketch.num_blocks, twin.attention.index.sketch.num_blocks)
    evidence = decoding.evidence
    if policy == "dense":
        assert evidence == [None, None]
    else:
        assert all((step.counts[..., 0] == PROMPT + 260).all() for step in evidence)


@pytest.mark.parametrize("prompt", [767, 639])
def test_a_block_that_fills_in_the_first_replay_is_encoded_from_what_the_replay_wrote(model, prompt):
    """Warm-up steps wrote the same token before, perhaps rounded otherwise."""
    cache = attach(model, policy="exact:0.05", reserve_tokens=1100)
    ids = torch.randint(2, 128, (2, prompt), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad(), crossover.switched(False):
        model(ids, **cache.kwargs())
        decoding = CapturedDecoding(model, cache)
        sketches = [layer.attention.index.sketch for layer in cache.served_layers]
        decoding._capture(ids[:, 0], prompt)
        assert all((sketch.num_blocks == prompt // 128).all() for sketch in sketches)
        decoding._held = prompt
        decoding(ids[:, 0])
        assert all((sketch.num_blocks == prompt // 128 + 1).all() for sketch in sketches)


def test_generate_is_greedy(model):
    first = torch.tensor([5, 9], device="cuda")
    with crossover.switched(False):
        decoding = CapturedDecoding(model, prompted(model, "exact:0.05"))
        chosen = decoding.generate(first, 20)
        logits = eager(model, prompted(model, "exact:0.05"), torch.cat([first[:, None], chosen[:, :-1]], 1))
    near = logits.max(-1).values - logits.gather(-1, chosen[..., None])[..., 0]
    assert (near < 4e-2).all()


def test_room_and_refusals(model):
    decoding = CapturedDecoding(model, prompted(model, "exact:0.05", reserve_tokens=PROMPT + 2))
    token = torch.tensor([5, 9], device="cuda")
    decoding(token), decoding(token)
    with pytest.raises(OutOfRoomError, match="702 reserved tokens"):
        decoding(token)
    with pytest.raises(PolicyError, match="without the host"):
        CapturedDecoding(model, prompted(model, "exact:0.1/exact:0.2"))
    host = attach(model, policy="exact:0.05", store="host")
    with torch.no_grad():
        model(torch.ones(1, 50, dtype=torch.long, device="cuda"), **host.kwargs())
    with pytest.raises(UnsupportedModelError, match="on the GPU"):
        CapturedDecoding(model, host)
