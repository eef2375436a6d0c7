"""A decode step of the Triton backend against float64, on a GPU or in Triton's interpreter (every_check.py runs them all)."""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cache and one query; every size odd on purpose."""

    policy: str
    head_dim: int = 64
    group: int = 3
    kv_len: int = 301
    frame_len: int = 64
    dtype: torch.dtype = torch.float16
    batch: int = 2
    num_kv_heads: int = 2
    pad: int = 0
    page_len: int = 0
    huge: bool = False
    spread: float = 1.0
    pushed: float = 0.05  # of the keys lie along the queries' direction, about six nats above the others


SMALL = [
    Case(policy="exact:0.05"),
    Case(policy="exact:0.05+sinks:3+recent:9", head_dim=128, group=1, pad=7),
    Case(policy="budget:0.05", head_dim=80, dtype=torch.float32, pad=5),
    Case(policy="topk:7", group=4, huge=True),
    Case(policy="fixed:20", head_dim=128, group=2, page_len=48),
    Case(policy="exact:0.2", frame_len=128, kv_len=130, page_len=48),
    Case(policy="topk:3", kv_len=40),
    Case(policy="exact:0.02", spread=40.0),
    Case(policy="topk:3000000000", kv_len=130),
    Case(policy="exact:0.05+recent:3000000000", kv_len=130),
]

# A policy, and what is not finite in one key or value: of such an output nothing may be claimed.
UNKNOWN = [
    (*case, bad)
    for case in itertools.product(("exact:0.05", "topk:7"), ("keys", "values"))
    for bad in (torch.inf, torch.nan)
]


def build(case: Case, device: str):
    """Query, keys, values, row bounds, and the sketch the backend itself encodes."""
    from louver.index.sketch import SketchIndex
    from louver.sketch.layout import SketchConfig

    g = torch.Generator().manual_seed(len(case.policy) + case.kv_len)
    shape = (case.batch, case.num_kv_heads)
    direction = torch.randn(*shape, 1, case.head_dim, generator=g)
    keys = 0.6 * torch.randn(*shape, case.kv_len, case.head_dim, generator=g)
    keys += 0.8 * torch.randn(*shape, 1, case.head_dim, generator=g)
    pushed = torch.rand(*shape, case.kv_len, 1, generator=g) < case.pushed
    keys += pushed * direction / direction.norm(dim=-1, keepdim=True) * 6
    values = torch.randn(*shape, case.kv_len, case.head_dim, generator=g) + 0.3
    q = direction + 0.6 * torch.randn(*shape, case.group, case.head_dim, generator=g)
    keys, values, q = keys * case.spread, values, q.flatten(1, 2)
    if case.huge:
        keys[:, :, 11, 3] = 65000.0  # beyond a frame, not beyond float16
        keys[:, :, 12, 5] = -65000.0
    keys, values, q = (x.to(device=device, dtype=case.dtype) for x in (keys, values, q))
    start = torch.full((case.batch,), 0, dtype=torch.int32, device=device)
    start[0] = case.pad
    stop = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)
    stop[-1] = case.kv_len - 2
    index = SketchIndex.build(
        keys, values, kv_start=start, kv_len=stop, config=SketchConfig(frame_len=case.frame_len), backend="reference"
    )
    return q, keys, values, start, stop, index


def truth(q, keys, values, start, stop):
    """Scores [batch, num_q_heads, kv_len], which keys are valid, and exact attention, in float64."""
    heads = keys.shape[1]
    grouped = q.double().unflatten(1, (heads, -1))
    scores = grouped @ keys.double().mT
    position = torch.arange(keys.shape[2], device=q.device)
    valid = ((position >= start[:, None]) & (position < stop[:, None]))[:, None]
    weights = torch.where(valid[:, :, None], scores * q.shape[2] ** -0.5, -torch.inf).softmax(-1)
    out = weights @ values.double()
    return scores.flatten(1, 2), valid, out.flatten(1, 2), weights.flatten(1, 2)


def lost_beyond_the_grid(device: str, tau: float) -> int:
    """Keys with a score of tau or more that a step under ``fixed:tau`` drops, where three blocks of 32 lie 50 nats above the others."""
    from louver import attend
    from louver.index.sketch import SketchIndex
    from louver.kernels import crossover
    from louver.sketch.layout import SketchConfig

    generator = torch.Generator().manual_seed(1)
    keys, values = (0.05 * torch.randn(1, 1, 32 * 64, 64, generator=generator) for _ in range(2))
    keys[:, :, : 3 * 64, 0] += 50
    q = torch.zeros(1, 2, 64)
    q[..., 0] = 1
    keys, values, q = (x.to(device, torch.float16) for x in (keys, values, q))
    with crossover.switched(False):
        index = SketchIndex.build(keys, values, config=SketchConfig(frame_len=64))
        result = attend(q, index, policy=f"fixed:{tau}", softmax_scale=1.0, record=True)
    wanted = (q.double()[:, :, None] @ keys.double().mT)[:, :, 0] >= tau
    assert wanted.any() == (tau < 55) and result.exact_mask is not None
    return int((wanted & ~result.exact_mask).sum())


def check_centers_above_every_key(policy: str, device: str, head_dim: int = 64, frame_len: int = 64) -> None:
    """Of keys along the axes, one each, a block's center lies hundreds of nats above every key, and so does the grid: output as float64's."""
    from louver import attend
    from louver.index.sketch import SketchIndex
    from louver.kernels import crossover
    from louver.sketch.layout import SketchConfig

    length = 3 * frame_len
    keys = torch.zeros(1, 1, length, head_dim)
    keys[:, :, torch.arange(length), torch.arange(length) % head_dim] = 100
    values = torch.randn(1, 1, length, head_dim, generator=torch.Generator().manual_seed(1))
    keys, values, q = (x.to(device, torch.float16) for x in (keys, values, torch.ones(1, 2, head_dim)))
    with crossover.switched(False):
        index = SketchIndex.build(keys, values, config=SketchConfig(frame_len=frame_len), backend="reference")
        index.backend = "triton"
        result = attend(q, index, policy=policy)
    want = truth(q, keys, values, index.store.kv_start, index.store.kv_len)[2]
    assert torch.isfinite(result.out).all()
    assert ((result.out.double() - want).norm(dim=-1) <= (result.certificate + result.arithmetic_bound).double()).all()
    assert (result.certificate + result.arithmetic_bound < 0.1).all()


def check(case: Case, device: str) -> dict[str, float]:
    """Encode, step, and hold every promise of the step against float64; returns what was measured."""
    from louver.kernels import crossover

    with crossover.switched(False):
        return _check(case, device)


def _check(case: Case, device: str) -> dict[str, float]:
    from louver.kernels.triton import attend_dense, encode_block, step
    from louver.policies.spec import parse
    from louver.sketch.layout import empty_sketch

    q, keys, values, start, stop, index = build(case, device)
    scale = q.shape[2] ** -0.5
    reference = index.sketch
    assert reference is not None
    sketch = empty_sketch(
        reference.config,
        case.batch,
        case.num_kv_heads,
        case.head_dim,
        torch.device(device),
        max(1, reference.capacity) + 1,
    )
    poison(sketch)
    sketch.value_mean.copy_(reference.value_mean)
    table, paged_keys, paged_values = None, keys, values
    if case.page_len:
        table, paged_keys, paged_values = pages(keys, values, case.page_len)
    encode_block(paged_keys, paged_values, sketch, start, stop, table)
    assert torch.equal(sketch.num_blocks, reference.num_blocks)
    check_radii(keys, values, start, sketch)

    policy = parse(case.policy)
    rule = policy.rule()
    assert rule is not None
    scores, valid, want, weights = truth(q, keys, values, start, stop)
    ends = (policy.sinks, policy.recent)
    last = min(policy.recent, case.kv_len)
    result = step(q, keys, values, sketch, rule, start, stop, scale, *ends, True, True)
    if case.page_len:
        for k in (
            paged_keys,
            paged_keys.contiguous(),
        ):  # dim-major pages may be served by other kernels: a step of tau apart
            again = step(q, k, paged_values, sketch, rule, start, stop, scale, *ends, True, False, table)
            torch.testing.assert_close(again.out, result.out, atol=5e-2 if rule.drop else 2e-3, rtol=2e-3)
            torch.testing.assert_close(again.tau * scale, result.tau * scale, atol=2e-3, rtol=1e-5)
    exact, out = result.exact_mask, result.out.double()
    assert exact is not None and torch.isfinite(out).all()
    lost = int((valid & (scores >= result.tau.double()[..., None]) & ~exact).sum())
    assert lost == 0, f"{lost} keys reach tau and are not exact"
    assert not (exact & ~valid).any()
    position = torch.arange(keys.shape[2], device=device)
    open_from = start + sketch.num_blocks * case.frame_len
    always = (position >= open_from[:, None]) | (position < (start + policy.sinks)[:, None])
    always |= position >= (stop - last)[:, None]
    assert (exact | ~(always[:, None] & valid)).all(), "a key that is always exact was not"
    if not rule.drop:
        error = (out - want).norm(dim=-1)
    else:
        kept = torch.where(exact, weights, 0.0)
        dropped = 1 - kept.sum(-1)
        assert (dropped <= result.dropped_mass_bound.double() + 1e-6).all(), "more mass was dropped than certified"
        error = (out - want).norm(dim=-1)
        only = kept / kept.sum(-1, keepdim=True)
        kept_out = (only.unflatten(1, (case.num_kv_heads, -1)) @ values.double()).flatten(1, 2)
        wrong = (out - kept_out).norm(dim=-1)
        assert (wrong <= result.arithmetic_bound.double()).all(), "arithmetic is off by more than its bound"
    bound = (result.certificate + result.arithmetic_bound).double()
    assert (error <= bound).all(), f"error {error.max():.3g} exceeds its certificate {bound.min():.3g}"
    if rule.drop and rule.tau is None:
        ranks = torch.where(valid, scores, -torch.inf).argsort(-1, descending=True).argsort(-1)
        count = torch.ceil((stop - start) * rule.share - 1e-6).clamp_min(max(1, rule.count))[:, None, None]
        assert (exact | ~(valid & (ranks < count))).all(), "a member of the true top was lost"

    if (
        case.dtype == torch.float16 and not case.huge and case.spread == 1.0
    ):  # an 8-bit cache is the same elements, widened
        narrow = [x.to(torch.float8_e4m3fn) for x in (paged_keys, paged_values)]
        widened = [x.half() for x in narrow]
        outs = [attend_dense(q, *kv, start, stop, scale, table)[0] for kv in (narrow, widened)]
        torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-3)
    dense, lse = attend_dense(q, paged_keys, paged_values, start, stop, scale, table)
    worst = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype]
    assert ((dense.double() - want).norm(dim=-1) <= worst * values.double().norm(dim=-1).max()).all()
    true_lse = torch.where(valid, scores * scale, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-2, rtol=1e-3)
    return {"error": float((error / want.norm(dim=-1)).mean()), "bound": float(bound.median())}


ERRORS = [
    Case(policy="error:0.1"),
    Case(policy="error:0.3+sinks:3+recent:9", head_dim=128, group=1, pad=7),
    Case(policy="error:0.02", head_dim=80, dtype=torch.float32, pad=5, frame_len=128, kv_len=700),
    Case(policy="error:0.1", group=4, huge=True),
    Case(policy="error:0.1", spread=40.0),
    Case(policy="error:0.2", group=7, kv_len=1100),
]


def check_within(case: Case, device: str) -> dict[str, float]:
    """A step under error:EPS keeps what it certifies, in float64, and certifies what was asked; returns what was measured."""
    from louver.kernels import crossover
    from louver.kernels.triton import attend_within
    from louver.policies.output_error import FIRST, OutputError
    from louver.policies.spec import parse

    q, keys, values, start, stop, index = build(case, device)
    policy = parse(case.policy)
    assert isinstance(policy, OutputError) and index.sketch is not None
    scale, ends = q.shape[2] ** -0.5, (policy.sinks, policy.recent)
    with crossover.switched(False):
        done = attend_within(q, keys, values, index.sketch, FIRST, policy.error, start, stop, scale, *ends, True)
    assert done is not None
    result, more = done
    scores, valid, want, _ = truth(q, keys, values, start, stop)
    assert result.exact_mask is not None
    assert not (valid & (scores >= result.tau.double()[..., None]) & ~result.exact_mask).any()
    out = result.out.double()
    error, bound = (out - want).norm(dim=-1), (result.certificate + result.arithmetic_bound).double()
    assert (error <= bound).all(), f"error {error.max():.3g} exceeds its certificate {bound.min():.3g}"
    asked = policy.error * out.norm(dim=-1)
    met = (bound <= asked) | (result.certificate == 0)
    assert met.all(), f"{int((~met).sum())} heads are not certified as asked"
    assert (more >= 0).all()
    exact = result.counts[..., 4].sum() / result.counts[..., 0].sum()
    bytes_fraction = float(
        (result.counts[..., 4].sum() * 4 + result.counts[..., 5].sum() / 2) / (result.counts[..., 0].sum() * 4)
    )
    return {
        "exact": float(exact),
        "bytes": bytes_fraction,
        "asked": float((bound / asked).median()),
        "everything": float((result.certificate == 0).float().mean()),
    }


def check_unknown(policy: str, where: str, bad: float, device: str) -> None:
    """Where dense attention is not finite a step must say that it knows nothing: +inf, never NaN."""
    from louver.kernels import crossover
    from louver.kernels.triton import encode_block, step
    from louver.kernels.triton.dense import attend_everything
    from louver.policies.spec import parse
    from louver.sketch.layout import empty_sketch

    case = Case(policy=policy)
    q, keys, values, start, stop, index = build(case, device)
    {"keys": keys, "values": values}[where][0, 0, 5, 7] = bad
    assert index.sketch is not None
    sketch = empty_sketch(index.sketch.config, 2, 2, case.head_dim, torch.device(device), index.sketch.capacity)
    encode_block(keys, values, sketch, start, stop, None)
    *_, want, _ = truth(q, keys, values, start, stop)
    unknown = ~torch.isfinite(want).all(-1)
    assert unknown.any() and not unknown[1].any()
    rule = parse(policy).rule()
    assert rule is not None
    with crossover.switched(False):
        result = step(q, keys, values, sketch, rule, start, stop, case.head_dim**-0.5)
    bounds = {policy: result.certificate + result.arithmetic_bound}
    evidence = attend_everything(q, keys, values, start, stop, case.head_dim**-0.5, None)[1]
    bounds["dense"] = evidence[1] + evidence[2]
    for name, bound in bounds.items():
        assert not torch.isnan(bound).any(), name
        assert torch.isinf(bound[unknown]).all(), name


def check_radii(keys, values, start, sketch) -> None:
    """Decoded radii are at least what the codes missed, in float64; so are the values' errors and spreads."""
    from louver.geometry.bounds import slice_lengths
    from louver.geometry.metric import inverse_weight
    from louver.sketch.layout import NO_BOUND, frame_centers, frame_scales, unpack_nibbles, unpack_radii

    length = sketch.config.frame_len

    def decode(codes, frame, scale):
        codes, center, scale = unpack_nibbles(codes), frame_centers(frame), frame_scales(frame, scale)
        return (codes.double() - 8 + center.double()[..., None, :]) * scale.double()[..., None, :]

    for row, blocks in enumerate(sketch.num_blocks.tolist()):
        span = slice(int(start[row]), int(start[row]) + blocks * length)
        k, v = (
            (x[row, :, span].double().unflatten(1, (blocks, length)) for x in (keys, values))
            if blocks
            else (None, None)
        )
        if k is None:
            continue
        part = (row, slice(None), slice(0, blocks))
        missed = k - decode(sketch.key_codes[part], sketch.key_frame[part], sketch.key_scale[part])
        scale = frame_scales(sketch.key_frame[part], sketch.key_scale[part])
        u = inverse_weight(scale, sketch.query_weight[row, :, None], sketch.config.metric)
        squares = missed.square() / u.double()[..., None, :]
        norms = torch.stack(
            [p.sum(-1) for p in squares.split(slice_lengths(sketch.dims, sketch.config.slice_dims), -1)], -1
        ).sqrt()
        radius = unpack_radii(sketch.key_radius[part], length)
        least, unit = (x[part].double()[..., None, :] for x in (sketch.radius_least, sketch.radius_unit))
        held = least + radius.double() * unit
        bounded = radius != NO_BOUND
        assert (held >= norms)[bounded].all(), "a radius is smaller than what it stands for"
        assert bounded.any()
        assert (held <= norms * 1.01 + unit * 1.01)[bounded].all()
        known = bounded.all(-1)
        off = (v - decode(sketch.value_codes[part], sketch.value_frame[part], sketch.value_scale[part])).norm(dim=-1)
        assert (torch.where(known, off, 0.0).amax(-1) <= sketch.value_error[part].double()).all()
        away = (v - sketch.value_mean[row, :, None, None].double()).norm(dim=-1)
        assert (torch.where(known, away, 0.0).amax(-1) <= sketch.value_spread[part].double()).all()


def check_encoder(head_dim: int, frame_len: int, device: str) -> float:
    """The share of frames' channels that are not the reference's: few, at any length of a block."""
    from louver.kernels.reference.encode import encode_block as plain
    from louver.kernels.triton import encode_block
    from louver.sketch.layout import SketchConfig, empty_sketch

    g, length = torch.Generator().manual_seed(head_dim), 2 * frame_len + 3
    spans = 4 * torch.rand(head_dim, generator=g)
    keys = torch.randn(1, 2, length, head_dim, generator=g) * spans + 3 * torch.randn(1, 2, 1, head_dim, generator=g)
    keys = keys.to(device)
    start, stop = (torch.full((1,), x, dtype=torch.int32, device=device) for x in (0, length))
    sketches = []
    for encode in (encode_block, plain):
        sketch = empty_sketch(SketchConfig(frame_len=frame_len), 1, 2, head_dim, torch.device(device), 2)
        encode(keys, keys, sketch, start, stop, None)
        sketches.append(sketch)
    check_radii(keys, keys, start, sketches[0])
    differ = (sketches[0].key_frame != sketches[1].key_frame).double().mean()
    assert differ <= 0.02, f"{differ:.1%} of the channels have another frame than the reference gives them"
    return float(differ)


def poison(sketch) -> None:
    """Fill what the encoder must write with what would be noticed."""
    for name, x in sketch.tensors():
        if name not in ("num_blocks", "query_weight", "value_mean"):
            x.fill_(torch.nan if x.dtype.is_floating_point else 255)


def pages(keys, values, page_len: int):
    """The same cache in shuffled pages; keys are stored dim-major to give K and V different strides."""
    batch, _, length, _ = keys.shape
    per_row = -(-length // page_len)
    order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(0)).to(keys.device)
    out = []
    for x in (keys, values):
        padded = torch.nn.functional.pad(x, (0, 0, 0, per_row * page_len - length))
        flat = padded.unflatten(2, (per_row, page_len)).transpose(1, 2).flatten(0, 1)  # pages heads page_len dim
        stored = torch.empty_like(flat)
        stored[order] = flat
        out.append(stored)
    major = out[0].transpose(2, 3).contiguous().transpose(2, 3)
    return order.reshape(batch, per_row).to(torch.int32), major, out[1]
