"""Every method that can be named equals dense attention when its budget is everything; a new one has to say what that is."""

import pytest
import torch

from experiments.full_budget import EVERYTHING, NO_BUDGET
from louver.attention import DenseAttention
from louver.errors import PolicyError
from louver.experiments.baselines.trees import KINDS, Tree
from louver.experiments.methods import NAMES, method
from louver.kernels import available_backends

PROMPT, STEPS, SCALE = 300, 3, 0.125  # two frames of the sketch are closed, and a third is open
PADDING = torch.tensor([0, 9], dtype=torch.int32)


def drawn(length, heads, seed):
    """Normal numbers [2, heads, length, 32], with an offset per channel as keys have it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, length, 32, generator=generator) + torch.randn(1, heads, 1, 32, generator=generator)


def decoded(layer, kv_start, rows=slice(None)):
    """A prompt and three decode steps; the results."""
    layer.record = True
    layer.append(drawn(PROMPT, 2, 1)[rows], drawn(PROMPT, 2, 2)[rows])
    layer.observe(drawn(PROMPT, 4, 3)[rows], kv_start, SCALE)
    results = []
    for step in range(STEPS):
        layer.append(drawn(1, 2, 10 + step)[rows], drawn(1, 2, 20 + step)[rows])
        results.append(layer.attend(2 * drawn(1, 4, 30 + step)[rows, :, 0], SCALE, kv_start))
    return results


def assert_equal_steps(layer, kv_start=None, rows=slice(None)):
    """Of two layers, one of them dense: the same output, and every key attended exactly."""
    for mine, full in zip(decoded(layer, kv_start, rows), decoded(DenseAttention(), kv_start, rows), strict=True):
        torch.testing.assert_close(mine.out, full.out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.lse, full.lse, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine.exact_mask, full.exact_mask)
        assert torch.equal(mine.stats.num_exact, full.stats.num_exact)


def test_every_method_says_what_everything_is():
    assert set(NAMES) == EVERYTHING.keys() | NO_BUDGET and not EVERYTHING.keys() & NO_BUDGET
    with pytest.raises(PolicyError, match="no method 'fp9'; there are exact, dense, "):
        method("fp9")


@pytest.mark.filterwarnings(
    "ignore:error.*asks for less than the arithmetic:louver.errors.LouverWarning"
)  # so all keys are exact
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_budget_of_everything_is_dense_attention(name, backend, padded):
    assert_equal_steps(method(EVERYTHING[name], backend).make(0), PADDING if padded else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_asked_for_everything_is_dense_attention(kind):
    assert_equal_steps(Tree(kind, 1.0), rows=slice(0, 1))


@pytest.mark.parametrize("name", sorted(NO_BUDGET))
def test_the_others_have_no_budget(name):
    """Nothing in their specification brings them to dense attention, and they do not pretend to be."""
    one = method(name)
    full = decoded(DenseAttention(), None)
    assert one.guarantee == "none" and all(
        (mine.out - dense.out).norm() > 1e-3 * dense.out.norm()
        for mine, dense in zip(decoded(one.make(0), None), full, strict=True)
    )
