"""search and bounds, for every backend: nothing above tau is lost, and every bound holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    Case,
    absolute_scores,
    assert_extras_within_slack,
    assert_nothing_lost,
    build_case,
    some_taus,
    true_scores,
)
from louver.geometry.metric import inverse_weight
from louver.kernels import available_backends, get_ops
from louver.sketch import SketchConfig
from louver.sketch.layout import (
    NO_BOUND,
    frame_centers,
    frame_scales,
    pack_frame,
    pack_nibbles,
    unpack_nibbles,
    unpack_radii,
)
from strategies import cases, generator, seeds

backends = pytest.mark.parametrize("backend", available_backends())


def sketched_truth(case: Case, width: int) -> torch.Tensor:
    """True scores in row coordinates, [batch, num_q_heads, width]; NaN past a row's end."""
    scores = true_scores(case)
    out = scores.new_full((*scores.shape[:2], width), torch.nan)
    for row, (start, end) in enumerate(zip(case.kv_start.tolist(), case.kv_len.tolist(), strict=True)):
        part = scores[row, :, start : min(end, start + width)]
        out[row, :, : part.shape[-1]] = part
    return out


@backends
@given(case=cases(), seed=seeds())
def test_search_loses_nothing(backend, case, seed):
    index = case.index(backend)
    for tau in some_taus(case, seed):
        selected = index.search(case.q, tau).mask(case.keys.shape[2])
        assert_nothing_lost(selected, case, tau)
        assert_extras_within_slack(selected, case, tau)


@backends
@given(case=cases())
def test_bounds_contain_the_real_score(backend, case):
    index = case.index(backend)
    bounds = get_ops(backend).bounds(case.q, case.keys, index.sketch, case.kv_start, case.kv_len, case.softmax_scale)
    undecided = bounds.undecided.repeat_interleave(case.group_size, 1)
    truth = sketched_truth(case, undecided.shape[-1])
    assert not (undecided & torch.isnan(truth)).any(), "a key past its row's end is undecided"
    fuzz = case.q.shape[2] * 2.0**-52 * truth.abs()
    assert not (undecided & (truth - fuzz > bounds.upper.double())).any()
    assert not (undecided & (truth + fuzz < bounds.lower.double())).any()


@backends
@given(case=cases(max_blocks=2, ragged=False), head=st.integers(0, 100), metric=st.sampled_from(("frame", "identity")))
def test_the_bound_holds_and_is_nearly_attained_along_a_residual(backend, case, head, metric):
    """Cauchy-Schwarz is an equality for the query that points along what a key's codes missed: no room to hide an error."""
    index = case.index(backend, config=SketchConfig(frame_len=case.config.frame_len, slice_dims=256, metric=metric))
    sketch, ops = index.sketch, get_ops(backend)
    head %= case.keys.shape[1]
    for block in range(int(sketch.num_blocks.min())):
        codes, frame, widest = (x[0, head, block] for x in (sketch.key_codes, sketch.key_frame, sketch.key_scale))
        scale = frame_scales(frame, widest)
        decoded = (unpack_nibbles(codes).double() - 8 + frame_centers(frame).double()) * scale.double()
        radius = unpack_radii(sketch.key_radius[0, head, block], case.config.frame_len)[:, 0].int()
        span = slice(block * case.config.frame_len, (block + 1) * case.config.frame_len)
        keys = torch.nn.functional.pad(case.keys[0, head, span].double(), (0, decoded.shape[-1] - case.keys.shape[-1]))
        inverse = inverse_weight(scale, sketch.query_weight[0, head], metric).double()
        norms = ((keys - decoded).square() / inverse).sum(-1)
        token = int(torch.where(radius < NO_BOUND, norms, -1).argmax())  # the one whose radius is not rounded up
        residual = (keys - decoded)[token]
        if not torch.isfinite(residual).all() or radius[token] == NO_BOUND or residual.norm() == 0:
            continue
        along = residual / inverse
        along = along[: case.keys.shape[-1]] / along.norm()
        for sign in (1, -1):
            q = torch.zeros(case.q.shape)
            q[0, head * case.group_size] = sign * along.float()
            bounds = ops.bounds(q, case.keys, sketch, case.kv_start, case.kv_len, 1.0)
            at = (0, head * case.group_size, span.start + token)
            true = q[at[:2]].double() @ keys[token, : q.shape[-1]]
            assert bounds.lower[at].double() <= true <= bounds.upper[at].double()
            edge = bounds.upper[at] if sign > 0 else bounds.lower[at]
            tolerance = 2e-3 * residual.norm() + 1e-4 * (frame_centers(frame).abs() + 8).mul(scale).double().norm()
            if backend == "reference":  # others may round the query, and pay for it in width
                assert (edge.double() - true).abs() <= tolerance + 1e-7, "the bound is looser than its radius"


@backends
@given(seed=seeds(), head_dim=st.sampled_from((33, 64, 128, 256)), offset=st.sampled_from((0.0, 10.0, 1e4)))
def test_a_sketch_that_misses_nothing_still_allows_for_rounding(backend, seed, head_dim, offset):
    """Keys exactly on their frame's grid have radius 0: the width left is what computing the estimate costs."""
    random = generator(seed)
    case = build_case(seed, kv_len=32, head_dim=head_dim, batch=1)
    sketch = case.index(backend).sketch
    codes = torch.randint(16, (1, 2, 2, 16, sketch.dims), generator=random)
    center = (offset * torch.randn(1, 2, 2, sketch.dims, generator=random)).round().clamp(-512, 511) / 2
    octave = torch.randint(12, 20, (1, 2, 2, sketch.dims), generator=random)
    keys = (codes - 8 + center[..., None, :]).double() * (2.0 ** (octave - 18))[..., None, :].double()
    exact = (keys.float().double() == keys).all(-1)
    sketch.key_codes.copy_(pack_nibbles(codes.byte()))
    sketch.key_frame.copy_(pack_frame(center, 8 * (19 - octave)))
    sketch.key_scale.fill_(8 * 19)
    sketch.key_radius.zero_()
    sketch.radius_least.zero_()
    sketch.radius_unit.fill_(2.0**-100)
    stored = keys[..., :head_dim].flatten(2, 3)
    bounds = get_ops(backend).bounds(case.q, stored.float(), sketch, case.kv_start, case.kv_len, 1.0)
    truth = (case.q.double().unflatten(1, (2, -1)) @ stored.mT).flatten(1, 2)
    on_grid = exact.flatten(2).repeat_interleave(case.group_size, 1)
    assert on_grid.float().mean() > 0.5  # most keys are float32 numbers, so that the test says something
    assert ((bounds.lower.double() <= truth) & (truth <= bounds.upper.double()) | ~on_grid).all()


@backends
@given(case=cases(), seed=seeds())
def test_search_answers_in_csr_form(backend, case, seed):
    tau = some_taus(case, seed)[0]
    found = case.index(backend).search(case.q, tau)
    assert found.indptr[0] == 0 and found.indptr[-1] == found.indices.numel() == found.scores.numel()
    truth = true_scores(case)
    for batch in range(case.q.shape[0]):
        for head in range(case.q.shape[1]):
            indices, scores = found.row(batch, head)
            assert (indices.diff() > 0).all()
            error = (scores.double() - truth[batch, head, indices]).abs()
            allowed = 1.1 * (case.q.shape[2] + 1) * 2.0**-24 * absolute_scores(case)[batch, head, indices] + 2.0**-96
            assert (error <= allowed).all()
    assert (found.num_scanned <= found.num_keys[:, None]).all()


@backends
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_a_key_that_is_not_finite_is_always_read_and_harms_no_other(backend, bad, where):
    case = build_case(3, kv_len=40, batch=1)
    getattr(case, where)[0, :, 5, 7] = bad
    index = case.index(backend)
    bounds = get_ops(backend).bounds(case.q, case.keys, index.sketch, case.kv_start, case.kv_len, 1.0)
    assert not bounds.undecided[:, :, 5].any()
    assert bounds.undecided[:, :, :32].sum() == 2 * 31
    selected = index.search(case.q, torch.full(case.q.shape[:2], 1e30)).mask(40)
    assert selected[:, :, 5].all() == (where == "keys")
    clean = torch.arange(40) != 5
    tau = torch.zeros(case.q.shape[:2])
    found = index.search(case.q, tau).mask(40)
    assert torch.equal(found[..., clean], (true_scores(case) >= 0)[..., clean])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_overflows_its_bounds_decides_every_key(backend, dtype):
    case = build_case(3, kv_len=40, batch=1, dtype=dtype)
    q = torch.full_like(case.q, 3e38)
    bounds = get_ops(backend).bounds(q, case.keys, case.index(backend).sketch, case.kv_start, case.kv_len, 1.0)
    assert not bounds.undecided.any()
    assert not torch.isnan(bounds.summary.edges).any()
    selected = case.index(backend).search(q, torch.full(q.shape[:2], 1e38)).mask(40)
    assert selected.all(), "scores that may have overflowed are kept"


@backends
def test_ties_at_tau_are_all_returned(backend):
    case = build_case(1, kv_len=200, traits=frozenset({"lattice", "duplicates"}))
    for tau in some_taus(case, 0):
        selected = case.index(backend).search(case.q, tau).mask(200)
        assert torch.equal(selected | (true_scores(case) < tau.double()[..., None]), torch.ones_like(selected))
