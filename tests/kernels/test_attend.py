"""The attention ops of every backend against float64, and against one another: dense, over a selection, in parts, on pages."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import absolute_scores, assert_same_sketch, build_case, some_taus, true_attention, true_scores
from louver.attention.arithmetic import attention_arithmetic, logit_error
from louver.errors import BackendError
from louver.geometry.rounding import gamma
from louver.kernels import OPS, available_backends, get_ops, resolve_backend
from louver.policies import parse
from louver.sketch.layout import PER_BLOCK
from strategies import cases, generator, seeds

backends = pytest.mark.parametrize("backend", available_backends())


def true_lse(case, kept):
    logits = torch.where(kept & case.valid(), true_scores(case) * case.softmax_scale, -torch.inf)
    return logits.logsumexp(-1) if logits.shape[-1] else logits.sum(-1) - torch.inf


def assert_close_to_truth(case, out, lse, kept):
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    terms = (kept & case.valid()).sum(-1).expand(case.q.shape[:2])
    bound = attention_arithmetic(case.q, case.keys, case.values, case.softmax_scale, terms).double()
    assert ((true_attention(case, kept) - out.double()).norm(dim=-1) <= bound * (1 + 1e-9)).all()
    empty = terms == 0
    assert (out[empty] == 0).all() and torch.isneginf(lse[empty]).all()
    expected = true_lse(case, kept)
    allowed = logit_error(case.q, case.keys, case.softmax_scale) + lse.abs() * 2.0**-22 + 1e-5 + gamma(terms + 8)
    assert ((lse.double() - expected).abs() <= allowed)[~empty].all()


@pytest.mark.parametrize("backend", available_backends())
def test_a_backend_has_every_op(backend):
    assert all(callable(getattr(get_ops(backend), op)) for op in OPS)
    assert resolve_backend(backend) == backend
    with pytest.raises(BackendError, match=r"backend='fpga' is not available for cpu; available here: .*reference"):
        resolve_backend("fpga")


@backends
@given(case=cases())
def test_dense_attention_is_within_arithmetic(backend, case):
    out, lse = get_ops(backend).attend_dense(
        case.q, case.keys, case.values, case.kv_start, case.kv_len, case.softmax_scale
    )
    assert_close_to_truth(case, out, lse, torch.ones(case.keys.shape[2], dtype=torch.bool))


@backends
@given(case=cases(), seed=seeds(), share=st.sampled_from((0.0, 0.1, 0.9)))
def test_attention_over_a_selection_is_within_arithmetic(backend, case, seed, share):
    kept = torch.rand((*case.q.shape[:2], case.keys.shape[2]), generator=generator(seed)) < share
    kept &= case.valid()
    flat = kept.flatten(0, 1)
    indptr = torch.nn.functional.pad(flat.sum(-1).cumsum(0), (1, 0))
    indices = flat.nonzero()[:, 1]
    ops = get_ops(backend)
    out, lse = ops.attend_selection(case.q, case.keys, case.values, indptr, indices, case.softmax_scale)
    assert_close_to_truth(case, out, lse, kept)
    truth = true_scores(case).flatten(0, 1)[flat]
    scores = ops.score(case.q, case.keys, indptr, indices)
    allowed = 1.1 * (case.q.shape[2] + 1) * 2.0**-24 * absolute_scores(case).flatten(0, 1)[flat] + 2.0**-96
    assert ((scores.double() - truth).abs() <= allowed).all()


@backends
def test_a_selection_without_weight_gives_zero_and_minus_infinity(backend):
    q, keys = torch.ones(1, 1, 64), torch.full((1, 1, 3, 64), -torch.inf)
    indptr, indices = torch.tensor([0, 2]), torch.tensor([0, 2])
    out, lse = get_ops(backend).attend_selection(q, keys, torch.ones_like(keys), indptr, indices, 0.125)
    assert (out == 0).all() and torch.isneginf(lse).all()


@backends
@given(case=cases(("offset", "duplicates")), parts=st.integers(1, 4))
def test_parts_merge_into_the_whole(backend, case, parts):
    ops, kv_len = get_ops(backend), case.keys.shape[2]
    place = (case.kv_start, case.kv_len, case.softmax_scale)
    whole, lse = ops.attend_dense(case.q, case.keys, case.values, *place)
    cuts = [kv_len * i // parts for i in range(parts + 1)]
    outs, lses = [], []
    for begin, end in pairwise(cuts):
        start = case.kv_start.clamp(begin, end) - begin
        stop = torch.maximum(case.kv_len.clamp(begin, end) - begin, start)
        part = (case.q.float(), case.keys[:, :, begin:end].float(), case.values[:, :, begin:end].float())
        out, part_lse = ops.attend_dense(*part, start, stop, case.softmax_scale)
        outs.append(out)
        lses.append(part_lse)
    merged, merged_lse = ops.merge(torch.stack(outs), torch.stack(lses))
    atol = {torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 4.0}[case.q.dtype]
    torch.testing.assert_close(merged, whole.float(), atol=atol, rtol=1e-2)
    torch.testing.assert_close(merged_lse, lse, atol=1e-2, rtol=1e-3)


@backends
def test_merging_nothing_gives_nothing(backend):
    out, lse = get_ops(backend).merge(torch.full((3, 1, 2, 4), torch.nan), torch.full((3, 1, 2), -torch.inf))
    assert (out == 0).all() and torch.isneginf(lse).all()


@backends
@given(case=cases(("offset", "spread", "lattice")), page_len=st.sampled_from((4, 16, 33)), seed=seeds())
def test_pages_in_any_order_change_nothing(backend, case, page_len, seed):
    """Pages scattered over a pool twice the size, poisoned elsewhere; and dim-major, as some engines keep them."""
    ops, (batch, heads, kv_len, head_dim) = get_ops(backend), case.keys.shape
    num_pages = -(-kv_len // page_len)
    table = torch.randperm(2 * batch * num_pages, generator=generator(seed))[: batch * num_pages].view(batch, num_pages)

    def paged(x):
        padded = torch.nn.functional.pad(x, (0, 0, 0, num_pages * page_len - kv_len))
        pool = x.new_full((2 * batch * num_pages, heads, page_len, head_dim), torch.nan)
        pool[table] = padded.unflatten(2, (num_pages, page_len)).transpose(1, 2)
        return pool.transpose(-1, -2).contiguous().transpose(-1, -2)

    keys, values, table = paged(case.keys), paged(case.values), table.int()
    flat, place = case.index(backend), (case.kv_start, case.kv_len)
    sketch = case.index(backend).sketch
    sketch.num_blocks.zero_()
    ops.encode_block(keys, values, sketch, *place, block_table=table)
    assert_same_sketch(flat.sketch, sketch)
    if not kv_len:
        return
    tau = some_taus(case, seed)[1]
    (indptr, indices, _), _ = ops.search(case.q, tau, keys, sketch, *place, block_table=table)
    found = flat.search(case.q, tau)
    assert torch.equal(indptr, found.indptr) and torch.equal(indices, found.indices)
    out, lse = ops.attend_dense(case.q, keys, values, *place, case.softmax_scale, block_table=table)
    assert_close_to_truth(case, out, lse, torch.ones(kv_len, dtype=torch.bool))
    rule = parse("exact:0.1").rule()
    steps = [
        ops.step(case.q, k, v, sketch, rule, *place, case.softmax_scale, record=True, block_table=t)
        for k, v, t in ((keys, values, table), (case.keys, case.values, None))
    ]
    error = (true_attention(case) - steps[0].out.double()).norm(dim=-1)
    assert (error <= (steps[0].certificate.double() + steps[0].arithmetic_bound) * (1 + 1e-9)).all()
    assert torch.equal(steps[0].counts, steps[1].counts)
    assert torch.equal(steps[0].exact_mask[..., :kv_len], steps[1].exact_mask)


@backends
@given(case=cases(("offset", "spread", "huge")), per_page=st.sampled_from((1, 2, 3)), seed=seeds())
@pytest.mark.parametrize("policy", ["exact:0.1", "topk:3"])
def test_rows_that_share_the_pages_of_a_sketch_change_nothing(backend, policy, case, per_page, seed):
    """A sketch in shuffled pages, poisoned elsewhere, gives what the same sketch gives row by row.

    The same keys are exact, bit for bit; a matrix product may add in another order when its operands lie elsewhere in memory.
    """
    ops, sketch, rule = get_ops(backend), case.index(backend).sketch, parse(policy).rule()
    rows, width = len(sketch.num_blocks), -(-sketch.capacity // per_page)
    pages = torch.randperm(2 * rows * width, generator=generator(seed))[: rows * width].view(rows, width)

    def paged(x):
        padded = x.new_full((*x.shape[:2], width * per_page, *x.shape[3:]), 97)
        padded[:, :, : x.shape[2]] = x
        pool = x.new_full((2 * rows * width, x.shape[1], per_page, *x.shape[3:]), 113)
        pool[pages] = padded.unflatten(2, (width, per_page)).transpose(1, 2)
        return pool

    moved = {name: paged(x) for name, x in sketch.tensors() if name in PER_BLOCK}
    shared = replace(sketch, pages=pages.int(), **moved)
    place = (case.kv_start, case.kv_len, case.softmax_scale)
    one, other = (ops.step(case.q, case.keys, case.values, s, rule, *place, record=True) for s in (sketch, shared))
    for name in ("counts", "exact_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("out", "lse", "certificate", "arithmetic_bound", "tau"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=2e-6, equal_nan=True)


@backends
def test_autocast_around_a_step_changes_nothing(backend):
    case = build_case(4, kv_len=200, head_dim=128)
    index, rule = case.index(backend), parse("exact:0.05").rule()
    arguments = (case.q, case.keys, case.values, index.sketch, rule, case.kv_start, case.kv_len, case.softmax_scale)
    plain = get_ops(backend).step(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = get_ops(backend).step(*arguments)
    assert torch.equal(plain.out, cast.out) and torch.equal(plain.certificate, cast.certificate)
