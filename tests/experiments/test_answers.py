"""Answers and intervals, checked by hand and by their own definitions."""

import math

import pytest
import torch

from louver.experiments.answers import Judged
from louver.experiments.intervals import accuracy, bootstrap, wilson


def test_judged_by_hand():
    full = torch.tensor([[[5.0, 0, 0], [0, 5, 0]], [[0, 0, 5], [5, 0, 0]]])
    logits = full.clone()
    logits[1, 1] = torch.tensor([0.0, 5, 0])
    expected = torch.tensor([[0, 1], [2, 0]])
    judged = Judged.of(logits, full, expected)
    assert judged.correct.tolist() == [True, False] and judged.agreement.tolist() == [1, 0.5]
    p = full[1, 1].double().softmax(0)
    kl = (p * (full[1, 1].double().log_softmax(0) - logits[1, 1].double().log_softmax(0))).sum()
    assert judged.kl.tolist() == pytest.approx([0, kl.item() / 2])
    assert judged.surprise[0].item() == pytest.approx(-math.log(p.max().item()), rel=1e-6)
    # A step that was filled up does not count.
    counts = torch.tensor([[True, True], [True, False]])
    assert Judged.of(logits, full, expected, counts).correct.tolist() == [True, True]
    both = Judged.joined([judged, judged])
    assert both.correct.tolist() == [True, False, True, False]
    fields = both.fields()
    assert fields["accuracy"] == 0.5 and fields["num_samples"] == 4 and not fields["is_verdict"]
    assert both.beside(both)["accuracy_gain_low"] == both.beside(both)["accuracy_gain_high"] == 0


def test_bootstrap_covers_as_it_says():
    """Of 200 intervals around means of 50 exponential samples, about 95% hold the true mean."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        found = bootstrap(torch.empty(50).exponential_(generator=generator), seed)
        assert found.low <= found.mean <= found.high
        held += found.low <= 1 <= found.high
    assert 0.86 <= held / 200 <= 0.99


def test_certainty_is_not_claimed():
    right = accuracy(torch.ones(100, dtype=torch.bool))
    assert right.mean == 1 and 0.95 < right.low < 0.97 and right.high == 1 and right.is_verdict
    assert not accuracy(torch.arange(25) < 12).is_verdict
    low, high = wilson(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_a_seed_gives_the_same_interval():
    values = torch.rand(30)
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)
