"""The ops between bounds and a step, on every backend: against float64, and against the reference's on the same bounds."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import absolute_scores, build_case, true_masses, true_scores, within_certificate
from louver.kernels import available_backends, get_ops
from louver.kernels.reference.bounds import bin_of, summed_by_bin
from louver.kernels.reference.terms import error_terms
from louver.protocols import COUNTS, BoundSummary, Cuts
from strategies import cases, generator, seeds

backends = pytest.mark.parametrize("backend", available_backends())
TAME = ("spread", "offset", "duplicates", "lattice", "zero_query", "flat")


def ready(case, backend="reference"):
    """Bounds of one backend, a sketch, and where the rows lie."""
    index = case.index("reference")
    place = (case.kv_start, case.kv_len, case.softmax_scale)
    return index.sketch, get_ops(backend).bounds(case.q, case.keys, index.sketch, *place, 1, 2), place


def quantiles(bounds, seed, count):
    """Thresholds [batch, num_q_heads] that lie among a head's upper bounds, the extremes included."""
    upper = torch.nan_to_num(bounds.upper, nan=0.0)
    if not upper.shape[-1]:
        return [torch.zeros(upper.shape[:2])] * count
    random = generator(seed)
    ranks = [torch.randint(upper.shape[-1], upper.shape[:2], generator=random) for _ in range(count)]
    ordered = upper.sort(-1).values
    found = [ordered.gather(-1, r[..., None])[..., 0] for r in ranks]
    limits = torch.tensor([torch.inf, -torch.inf])[torch.randint(2, upper.shape[:2], generator=random)]
    return [torch.where(torch.rand(x.shape, generator=random) < 0.1, limits, x) for x in found]


def tiers(case, seed, how, *backends):
    """The cuts, and the step of each backend under them, from the same bounds. how: None, "drop", or "rank" with a rank."""
    sketch, bounds, place = ready(case)
    unread, exact = quantiles(bounds, seed, 2)
    unread, exact = torch.minimum(unread, exact), torch.maximum(unread, exact)
    cuts = Cuts(unread=unread, fine=exact, exact=exact)
    if how == "rank":
        rank = torch.randint(1, 9, exact.shape, generator=generator(seed))
        cuts = Cuts(unread=unread, fine=unread, exact=unread, rank=rank)
    arguments = (case.q, case.keys, case.values, sketch, bounds, cuts, *place, how is not None, True)
    return cuts, *(get_ops(backend).attend_tiers(*arguments) for backend in backends)


@backends
@given(case=cases(), seed=seeds(), how=st.sampled_from((None, "drop", "rank")))
def test_tiers_of_any_cuts_keep_their_certificate(backend, case, seed, how):
    cuts, result = tiers(case, seed, how, backend)
    assert within_certificate(case, result).all()
    assert not torch.isnan(result.certificate + result.arithmetic_bound + result.dropped_mass_bound).any()
    exact, truth = result.exact_mask, true_scores(case)
    assert not (exact & ~case.valid()).any(), "a padding token is exact"
    fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    relevant = case.valid() & (truth - fuzz >= result.tau.double()[..., None])
    assert not (relevant & ~exact).any(), "a key above the reported tau is inexact"
    if how == "drop":
        assert torch.equal(result.tau, torch.maximum(cuts.unread, cuts.exact))
    dropped = torch.where(exact | ~case.valid(), 0.0, true_masses(case)).sum(-1)
    limit = result.dropped_mass_bound.double() if how else torch.zeros_like(dropped)
    assert how is None or (dropped <= limit * (1 + 1e-9) + 1e-15).all()
    everything = (exact | ~case.valid()).all(-1) & torch.isfinite(result.certificate)
    assert (result.certificate[everything] == 0).all() and (limit[everything] == 0).all()


@backends
@given(case=cases(TAME), seed=seeds(), how=st.sampled_from((None, "drop", "rank")))
def test_tiers_do_as_the_reference_does_with_the_same_bounds(backend, case, seed, how):
    """The same keys are exact and counted; certificates are wider by what rounding weights to 8 bits adds, and no more."""
    _, one, other = tiers(case, seed, how, backend, "reference")
    if how is None:
        assert torch.equal(one.exact_mask, other.exact_mask) and torch.equal(one.counts, other.counts)
    else:  # the rounding of a score is bounded by norms there, by products here: what is within it may be kept as well
        assert how == "rank" or not (other.exact_mask & ~one.exact_mask).any()
    same = (one.exact_mask == other.exact_mask).all(-1) if other.exact_mask.shape[-1] else other.lse == other.lse
    size = case.values.float().norm(dim=-1).amax() if case.values.numel() else torch.ones(())
    atol = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 0.1}[case.q.dtype]
    assert ((one.out.float() - other.out.float()).norm(dim=-1) <= atol * size)[same].all()
    torch.testing.assert_close(one.lse[same], other.lse[same], rtol=2e-3, atol=1e-2)
    telling = same & (other.certificate < size)  # beyond, neither says anything
    if case.keys.numel():  # nor where float32 can hardly tell logits apart
        telling &= (absolute_scores(case) * case.softmax_scale).nan_to_num(0.0).amax(-1) < 300
    assert (one.certificate <= 1.05 * other.certificate + 0.01 * size)[telling].all()
    assert (one.dropped_mass_bound <= 1.001 * other.dropped_mass_bound + 1e-3)[telling].all()


def pulled(weight, floor, ceiling, distance):
    """How far some weights between floor and ceiling do pull the average: what they attain, not a bound on it."""
    rate = torch.zeros(weight.shape[:-1], dtype=torch.float64)
    up, down = (ceiling - weight) * distance, (weight - floor) * distance
    for _ in range(12):
        rises = up - rate[..., None] * ceiling > down - rate[..., None] * floor
        rate = torch.where(rises, up, down).sum(-1) / torch.where(rises, ceiling, floor).sum(-1)
    return rate


@backends
@given(case=cases(TAME), seed=seeds())
def test_no_weights_within_their_bounds_exceed_the_certificate(backend, case, seed):
    """The joint maximum in float64, from the ends themselves: a certificate below it would be a lie about some keys."""
    sketch, bounds, place = ready(case)
    unread, cut = quantiles(bounds, seed, 2)
    cuts = Cuts(unread=torch.minimum(unread, cut), fine=cut, exact=cut)
    result = get_ops(backend).attend_tiers(
        case.q, case.keys, case.values, sketch, bounds, cuts, *place, False, record=True
    )
    group = case.group_size
    sketched = bounds.undecided.repeat_interleave(group, 1)
    reached = (sketched & ~(bounds.upper < cut[..., None])).unflatten(1, (-1, group)).any(2)
    sketched = sketched & ~reached.repeat_interleave(group, 1)
    blocks = sketched.shape[2] // case.config.frame_len
    spread = sketch.value_spread[:, :, :blocks].repeat_interleave(case.config.frame_len, -1).repeat_interleave(group, 1)
    mean = sketch.value_mean[..., : case.q.shape[2]].repeat_interleave(group, 1)
    lost = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[
        case.q.dtype
    ]  # of an output's digits
    away = (mean - result.out.float()).double().norm(dim=-1) - lost * result.out.double().norm(dim=-1)
    away = (away * (1 - 1e-3)).clamp_min(0)
    logit = bounds.estimate.double() * case.softmax_scale
    off = bounds.half_width.double() * case.softmax_scale
    scores = torch.where(result.exact_mask, true_scores(case) * case.softmax_scale, -torch.inf)
    peak = torch.cat([scores, torch.where(sketched, logit, -torch.inf)], -1)
    if not peak.shape[-1]:
        return
    top = peak.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    parts = [torch.where(sketched, (logit + way * off - top).exp(), 0.0) for way in (0, -1, 1)]
    exact = (scores - top).exp()
    weight, floor, ceiling = (torch.cat([x, exact], -1) for x in parts)
    distance = torch.where(sketched, spread.double() + away[..., None], 0.0)
    distance = torch.nn.functional.pad(distance, (0, exact.shape[-1]))
    least = pulled(weight, floor, ceiling, distance)
    known = torch.isfinite(least) & (case.valid().any(-1))
    assert (result.certificate >= 0.98 * least - 1e-5)[known].all()


@backends
def test_a_step_may_be_told_where_its_tokens_lie(backend):
    """Pages give what whole rows give."""
    case = build_case(5, kv_len=96, batch=2, head_dim=64)
    table = torch.randperm(12, generator=generator(1)).view(2, 6).int()

    def paged(x):
        pool = x.new_full((12, x.shape[1], 16, x.shape[3]), torch.nan)
        pool[table.long()] = x.unflatten(2, (6, 16)).transpose(1, 2)
        return pool

    sketch, bounds, place = ready(case)
    low, high = torch.full((2, 4), -0.5), torch.full((2, 4), 1.0)
    for drop in (False, True):
        steps = [
            get_ops(backend).attend_tiers(
                case.q, keys, values, sketch, bounds, Cuts(unread=low, fine=high, exact=high), *place, drop, True, where
            )
            for keys, values, where in ((case.keys, case.values, None), (paged(case.keys), paged(case.values), table))
        ]
        assert torch.equal(steps[0].exact_mask, steps[1].exact_mask) and torch.equal(steps[0].counts, steps[1].counts)
        torch.testing.assert_close(steps[0].out, steps[1].out)
        torch.testing.assert_close(steps[0].certificate, steps[1].certificate)
    cut = bounds.summary.shift / case.softmax_scale - 1
    one = get_ops(backend).tighten(case.q, case.keys, bounds, cut, *place)
    other = get_ops(backend).tighten(case.q, paged(case.keys), bounds, cut, *place, block_table=table)
    assert torch.equal(one.upper_count, other.upper_count)


def check_summary(summary: BoundSummary, estimate, half_width, kept, decided_floors, decided):
    """Every bin holds what its edges say; masses are right within rounding."""
    upper, lower = estimate + half_width, estimate - half_width
    assert (summary.edges[..., 1:] <= summary.edges[..., :-1]).all()
    assert (summary.edges[..., 0] == torch.inf).all() and (summary.edges[..., -1] == -torch.inf).all()
    place = bin_of(upper, summary.edges)
    assert torch.equal(summary.upper_count, summed_by_bin(place, kept.int(), summary.edges))
    floors = torch.where(decided, decided_floors, -torch.inf).nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    counted = summed_by_bin(bin_of(lower, summary.edges), kept.int(), summary.edges)
    assert int((summary.lower_count - counted).sum()) == int(decided.sum())
    shift, scale = summary.shift.double()[..., None], summary.softmax_scale
    for mass, bound in ((summary.upper_mass, upper), (summary.lower_mass, lower)):
        weight = torch.where(kept, (bound.double() * scale - shift).exp(), 0.0)
        expected = summed_by_bin(place, weight, summary.edges)
        torch.testing.assert_close(mass.double(), expected, rtol=1e-3, atol=1e-6)
    known = torch.where(decided, (floors.double() * scale - shift).exp(), 0.0).sum(-1)
    torch.testing.assert_close(summary.decided_mass.double(), known, rtol=1e-3, atol=1e-6)
    if kept.shape[-1] + decided.shape[-1]:
        best = torch.cat([floors, torch.where(kept, lower, -torch.inf)], -1).amax(-1)
        torch.testing.assert_close(summary.best_lower, best, rtol=1e-3, atol=1e-2)


@backends
@given(case=cases(TAME))
def test_histograms_count_every_key_once(backend, case):
    _, bounds, _ = ready(case, backend)
    undecided = bounds.undecided.repeat_interleave(case.group_size, 1)
    length = (case.kv_len - case.kv_start).tolist()
    longest = max(length)
    floors = torch.full((*case.q.shape[:2], longest), torch.nan)
    decided = torch.zeros(floors.shape, dtype=torch.bool)
    for row, start in enumerate(case.kv_start.tolist()):
        floors[row, :, : length[row]] = true_scores(case)[row, :, start : start + length[row]].float()
        decided[row, :, : length[row]] = True
    decided[..., : undecided.shape[2]] &= ~undecided[..., :longest]
    if case.keys.float().norm(dim=-1).max() < 100 if case.keys.numel() else True:  # scores round far below a bin
        check_summary(bounds.summary, bounds.estimate, bounds.half_width, undecided, floors, decided)


@backends
@given(case=cases(TAME), seed=seeds(), retire=st.booleans())
def test_scored_keys_are_bounded_by_their_scores(backend, case, seed, retire):
    _, bounds, place = ready(case)
    cut = quantiles(bounds, seed, 1)[0]
    one, other = (get_ops(b).tighten(case.q, case.keys, bounds, cut, *place, retire) for b in (backend, "reference"))
    truth = true_scores(case)
    best = torch.where(case.valid(), truth, -torch.inf)
    best = best.amax(-1) if best.shape[-1] else best.sum(-1) - torch.inf
    if not retire:
        assert (one.best_lower.double() <= best + 1e-9 * best.abs().nan_to_num(0, neginf=0)).all()
    assert torch.equal(one.upper_count.sum(-1), other.upper_count.sum(-1))
    assert torch.equal(one.lower_count.sum(-1), other.lower_count.sum(-1))
    scale = case.keys.float().abs().amax() * case.q.float().abs().amax() * case.q.shape[2] if case.keys.numel() else 1.0
    torch.testing.assert_close(one.best_lower, other.best_lower, rtol=1e-4, atol=float(1e-5 * scale) + 1e-6)
    if retire and scale < 300:
        mass, expected = one.retired_mass * (one.shift - other.shift).exp(), other.retired_mass
        torch.testing.assert_close(mass, expected, rtol=1e-2, atol=1e-5)


@backends
@given(case=cases(TAME), seed=seeds(), allowed=st.sampled_from((0.0, 1e-3, 0.05, 0.5, 10.0)))
def test_settled_cuts_fit_what_is_allowed_at_little_cost(backend, case, seed, allowed):
    sketch, bounds, _ = ready(case)
    ask = torch.full(case.q.shape[:2], allowed)
    cuts, best = (get_ops(b).settle(case.q, sketch, bounds, ask) for b in (backend, "reference"))
    terms, summary = error_terms(case.q, sketch, bounds), bounds.summary
    above, upto = (summary.edges[..., :-1] > cut[..., None] for cut in (cuts.exact, cuts.unread))
    assert (cuts.unread <= cuts.exact).all()
    floors = summary.decided_mass + torch.where(above, terms.mass, summary.lower_mass).sum(-1)
    left = torch.where(above, 0.0, torch.where(upto, terms.coarse, terms.unread)).sum(-1)
    slack = 1e-4 * (terms.unread.sum(-1) + allowed * floors) + 1e-30
    assert (left <= allowed * floors + slack).all()

    def cost(cuts):
        exact, read = (
            (summary.upper_count * (summary.edges[..., :-1] > cut[..., None])).sum(-1)
            for cut in (cuts.exact, cuts.unread)
        )
        return exact * (terms.exact_bytes - terms.coarse_bytes) + read * terms.coarse_bytes

    if allowed > 0 and not case.traits & {"spread", "offset"}:  # what one backend calls nothing is another's e^-87
        assert (cost(cuts) <= 1.02 * cost(best) + 8 * terms.exact_bytes).all()
    low, high = quantiles(bounds, seed, 2)
    coded = [torch.zeros_like(bounds.undecided) for _ in range(2)]
    counts = [
        get_ops(b).count_tiers(bounds, low, high, case.config.frame_len, mark)
        for b, mark in zip((backend, "reference"), coded, strict=True)
    ]
    assert torch.equal(counts[0], counts[1]) and torch.equal(coded[0], coded[1])


@backends
@pytest.mark.parametrize("drop", [False, True])
def test_heads_whose_cuts_stay_keep_their_results(backend, drop):
    case = build_case(6, kv_len=300, batch=2, num_kv_heads=3)
    sketch, bounds, place = ready(case)
    first, second = (quantiles(bounds, seed, 1)[0] for seed in (1, 2))
    changed = torch.tensor([[True, False, True], [False, False, True]])
    second = torch.where(changed.repeat_interleave(2, 1), second, first)
    one, other = (Cuts(unread=cut - 1, fine=cut, exact=cut) for cut in (first, second))
    same = (case.q, case.keys, case.values, sketch, bounds)
    before = get_ops(backend).attend_tiers(*same, one, *place, drop, True)
    fresh = get_ops(backend).attend_tiers(*same, other, *place, drop, True)
    after = get_ops(backend).attend_tiers(*same, other, *place, drop, True, before=(before, changed))
    for f in fields(fresh):
        assert torch.equal(getattr(fresh, f.name), getattr(after, f.name)), f.name


@backends
def test_attending_adds_up(backend):
    """What a step counts is what count_tiers says it would read."""
    case = build_case(3, kv_len=400, batch=1)
    cuts, result = tiers(case, 4, None, backend)
    _, bounds, _ = ready(case)
    _, exact, coarse, blocks = get_ops(backend).count_tiers(bounds, cuts.unread, cuts.exact, 16).unbind(-1)
    counted = dict(zip(COUNTS, result.counts.unbind(-1), strict=True))
    decided = counted["blocks"] * 16 - bounds.undecided.sum(-1)
    assert torch.equal(counted["exact"], exact + decided) and torch.equal(counted["coarse"], coarse)
    assert torch.equal(counted["value_blocks"], blocks)
