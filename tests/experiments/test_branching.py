"""One reading of a prompt serves every method as a prompt of its own would."""

import pytest
import torch

from experiments.full_budget import EVERYTHING
from experiments.toy import VOCAB, toy_model
from louver.errors import PolicyError
from louver.experiments.branching import Prompt
from louver.experiments.compare import forced
from louver.experiments.decoding import decode, prefill
from louver.experiments.methods import method
from louver.integrations.transformers import attach
from louver.policies import parse

PROMPT, STEPS = 600, 5
PARTS = ("exact:0.05", "budget:0.1", "fp8", "kivi4", "streaming:0.3", "h2o:0.3", "snapkv:0.3", "quest:0.3", "twilight:0.9",
         "torch-ivf:0.2")  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCAB, (3, PROMPT), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompt(model, ids):
    return Prompt.read(model, ids)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB, (3, STEPS), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def full(prompt, tokens):
    return prompt.forced(prompt.recorded, tokens).logits


def test_dense_is_the_model_itself(model, ids, tokens, full):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, tokens[:, :-1]], 1), logits_to_keep=STEPS).logits
    model.set_attn_implementation("louver")
    torch.testing.assert_close(full, whole, atol=2e-4, rtol=1e-4)


def promised(spec):
    """What a specification's row may claim: a policy's own word, "none" for everything else."""
    try:
        return parse(spec).guarantee
    except PolicyError:
        return "none"


@pytest.mark.filterwarnings(
    "ignore:error.*asks for less than the arithmetic:louver.errors.LouverWarning"
)  # so all keys are exact
@pytest.mark.parametrize("spec", EVERYTHING.values())
def test_equals_dense_at_full_budget(spec, prompt, tokens, full):
    one = method(spec)
    decoded = prompt.forced(prompt.served_by(one.make), tokens)
    torch.testing.assert_close(decoded.logits, full, atol=2e-3, rtol=1e-3)
    assert torch.equal(decoded.logits.argmax(-1), full.argmax(-1))
    assert one.guarantee == promised(spec)


@pytest.mark.parametrize("spec", PARTS)
def test_serves_as_in_a_cache_of_its_own(spec, model, ids, prompt, tokens):
    """The recorded prompt, shown part by part, leads to the logits of prefill and decode."""
    decoded = prompt.forced(prompt.served_by(method(spec).make), tokens)
    for row in range(2):
        cache = attach(model, layer=method(spec).make)
        prefill(model, cache, ids[row : row + 1, :-1])
        alone = decode(model, cache, int(ids[row, -1]), STEPS, forced=tokens[row].tolist())
        torch.testing.assert_close(decoded.logits[row], alone.logits, atol=2e-3, rtol=1e-3)
        assert decoded.bytes_fraction < 1 and cache.stats.num_dense_calls == 0


def test_families_share_what_was_prepared(prompt, tokens):
    specs = ("budget:0.1", "h2o:0.3", "exact:0.05", "quest:0.5", "h2o:0.6", "twilight:0.5", "dense", "quest:0.1", "fp8")
    methods = [method(spec) for spec in specs]
    together = {one.spec: decoded for one, decoded in forced(prompt, methods, tokens)}
    assert set(together) == set(specs)
    for one in methods:
        alone = prompt.forced(prompt.served_by(one.make), tokens)
        torch.testing.assert_close(together[one.spec].logits, alone.logits, atol=2e-4, rtol=1e-4)
        assert together[one.spec].bytes_fraction == pytest.approx(alone.bytes_fraction)


@pytest.mark.parametrize("spec", ["dense", "exact:1.0", "exact:0.05", "quest:0.3"])
def test_greedy_tokens_are_the_most_probable_when_forced(spec, prompt):
    layers = prompt.served_by(method(spec).make)
    tokens, decoded = prompt.greedy(layers, 20)
    again = prompt.forced(layers, tokens)
    assert torch.equal(again.logits.argmax(-1), tokens) and tokens.shape == (3, 20)
    off = (again.logits - decoded.logits).abs().amax(-1)
    # Read together and one by one queries round differently. Where keys have tiers, a bound near a cut moves its key to another.
    moved = off > 2e-4
    assert moved.sum() <= (3 if spec == "exact:0.05" else 0) and off.max() < 1e-2


@pytest.mark.parametrize("length", [2, 513, 514, 700])
def test_any_length_is_read_whole(length, model):
    ids = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(4))
    prompt = Prompt.read(model, ids)
    seen = sum(queries.shape[2] for queries in prompt.recorded[0].queries)
    assert prompt.recorded[0].kv_len == length - 1
    assert seen == length - 1 or length == 2  # a single token is a decode step


def test_unknown_methods():
    for spec in ("fp9", "streaming", "torch-ivf:x", "torch-ivf:-1", "quest:none"):
        with pytest.raises(PolicyError):
            method(spec)
