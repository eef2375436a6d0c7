"""Decode steps over an engine's pages: whoever owned them before, whoever shares them, whatever is written over."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from louver import SketchConfig
from louver.attention import PagedAttention, PagedRows, paged
from louver.errors import PolicyError, ShapeError
from louver.kernels import available_backends, get_ops

PAGE, HEADS, GROUP, DIM = 16, 2, 3, 32
SCALE = DIM**-0.5
CONFIG = SketchConfig(frame_len=8)
backends = pytest.mark.parametrize("backend", available_backends())


@dataclass
class Engine:
    """A pool of pages, keys dim-major and values token-major as some engines have them, and a reader that is told of writes."""

    paged: PagedAttention
    num_pages: int = 40
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __post_init__(self):
        # What nobody has written yet must not matter.
        self.keys = torch.full((self.num_pages, HEADS, DIM, PAGE), torch.nan).transpose(2, 3)
        self.values = torch.full((self.num_pages, HEADS, PAGE, DIM), torch.nan)
        self.free = torch.randperm(self.num_pages, generator=self.generator).tolist()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def write(self, request, begin, end):
        """Tokens begin .. end of a request, over whatever its pages held."""
        while len(request) * PAGE < end:
            request.append(self.free.pop())
        position = torch.arange(begin, end)
        page, offset = torch.tensor(request)[position // PAGE], position % PAGE
        self.keys[page, :, offset] = 2 * self.normal(end - begin, HEADS, DIM) + self.normal(1, HEADS, DIM)
        self.values[page, :, offset] = self.normal(end - begin, HEADS, DIM)
        self.paged.wrote(torch.cat([page * PAGE + offset, torch.tensor([-1])]))

    def release(self, request):
        self.free[:0] = request
        request.clear()

    def step(self, requests, lengths):
        """Attend one query per request; checks everything against float64 and returns the result."""
        width = max(map(len, requests))
        table = torch.tensor([r + [-1] * (width - len(r)) for r in requests], dtype=torch.int32)
        rows = PagedRows.of(table, torch.tensor(lengths, dtype=torch.int32), PAGE, max(lengths))
        q = self.normal(len(requests), HEADS * GROUP, DIM)
        result = self.paged.attend(q, self.keys, self.values, rows, SCALE, record=True)
        for i, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            pages = torch.tensor(request)
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length].double() for x in (self.keys, self.values))
            scores = (q[i].double().unflatten(0, (HEADS, GROUP)) @ k.mT).flatten(0, 1)
            truth = ((scores * SCALE).softmax(-1).unflatten(0, (HEADS, GROUP)) @ v).flatten(0, 1)
            mask = result.exact_mask[i]
            assert not mask[:, length:].any()
            assert not ((scores >= result.tau[i].double()[:, None]) & ~mask[:, :length]).any(), "a false negative"
            error = (truth - result.out[i].double()).norm(dim=-1)
            assert (error <= result.certificate[i].double() + result.arithmetic_bound[i].double()).all()
        return result


def make_engine(backend, policy="exact:0.05"):
    return Engine(PagedAttention(policy, 40, HEADS, PAGE, DIM, config=CONFIG, backend=backend))


@backends
@pytest.mark.parametrize("policy", ["exact:1.0", "exact:0.02", "topk:3"])
def test_requests_come_grow_and_go(backend, policy):
    engine = make_engine(backend, policy)
    one, two, three = [], [], []
    engine.write(one, 0, 70)
    engine.step([one], [70])
    engine.write(two, 0, 33)
    for token in range(70, 90):
        engine.write(one, token, token + 1)
        engine.step([two, one], [33, token + 1])
    engine.release(one)
    engine.write(three, 0, 200)  # into the pages of the first, in another order
    result = engine.step([three, two], [200, 33])
    assert result.out.shape == (2, HEADS * GROUP, DIM)


@backends
def test_a_stale_sketch_is_made_again_and_a_current_one_is_not(backend):
    engine = make_engine(backend)
    request = []
    engine.write(request, 0, 5 * PAGE)
    pages, full = engine.paged.pages, torch.tensor(request)
    assert pages.refresh(full, engine.keys, engine.values) == 5
    assert pages.refresh(full, engine.keys, engine.values) == 0
    engine.write(request, 2 * PAGE - 1, 2 * PAGE + 1)  # a rejected draft's tokens, written over: the ends of two pages
    assert pages.refresh(full, engine.keys, engine.values) == 2
    engine.step([request], [5 * PAGE])


@backends
def test_a_shared_prefix_is_sketched_once(backend):
    engine = make_engine(backend)
    one = []
    engine.write(one, 0, 4 * PAGE)
    two = list(one)
    engine.write(one, 4 * PAGE, 5 * PAGE + 3)
    engine.write(two, 4 * PAGE, 4 * PAGE + 9)
    rows = PagedRows.of(torch.tensor([one, [*two, -1]]), torch.tensor([5 * PAGE + 3, 4 * PAGE + 9]), PAGE, 5 * PAGE + 3)
    assert sorted(rows.full_pages.tolist()) == sorted(one[:5])
    result = engine.step([one, two], [5 * PAGE + 3, 4 * PAGE + 9])
    assert result.stats.num_keys[:, 0].tolist() == [5 * PAGE + 3, 4 * PAGE + 9]
    assert result.stats.num_coarse.sum() + result.stats.num_unread.sum() > 0


@backends
def test_one_request_with_a_query_that_is_not_finite_harms_no_other(backend):
    engine = make_engine(backend)
    one, two = [], []
    engine.write(one, 0, 50)
    engine.write(two, 0, 60)
    rows = PagedRows.of(torch.tensor([one, two]), torch.tensor([50, 60]), PAGE, 60)
    q = engine.normal(2, HEADS * GROUP, DIM)
    q[0] = torch.nan
    broken = engine.paged.attend(q, engine.keys, engine.values, rows, SCALE)
    q[0] = 0
    whole = engine.paged.attend(q, engine.keys, engine.values, rows, SCALE)
    assert torch.equal(broken.out[1], whole.out[1]) and torch.isfinite(whole.out).all()


def test_kernels_get_a_query_whose_memory_holds_its_own_sign(monkeypatch):
    """What ``z.conj().imag`` is holds the other one, and a kernel on a GPU reads memory."""
    engine, request = make_engine("reference"), []
    engine.write(request, 0, 50)
    rows = PagedRows.of(torch.tensor([request]), torch.tensor([50]), PAGE, 50)
    q, ops, negated = engine.normal(1, HEADS * GROUP, DIM), get_ops("reference"), []

    def step(q, *rest):
        negated.append(q.is_neg())
        return ops.step(q, *rest)

    want = engine.paged.attend(q, engine.keys, engine.values, rows, SCALE)
    monkeypatch.setattr(paged, "get_ops", lambda backend: SimpleNamespace(step=step))
    got = engine.paged.attend(torch._neg_view(-q), engine.keys, engine.values, rows, SCALE)
    assert negated == [False] and torch.equal(got.out, want.out)


def test_what_pages_cannot_do_is_said_at_the_door():
    with pytest.raises(PolicyError, match="can't be followed over a paged cache; wanted one that"):
        PagedAttention("dense", 4, HEADS, PAGE, DIM, config=CONFIG)
    with pytest.raises(ShapeError, match="frame_len=128 does not divide the cache's page_len=16"):
        PagedAttention("exact:0.01", 4, HEADS, PAGE, DIM)


def test_the_sketch_takes_the_share_of_the_cache_that_the_design_promises():
    paged = PagedAttention("exact:0.01", 64, 2, 128, 64)
    assert 0.26 < paged.memory_bytes() / (64 * 2 * 128 * 64 * 2 * 2) < 0.29
