"""Every baseline against its definition, written out token by token."""

import math

import pytest
import torch

from louver.errors import PolicyError
from louver.experiments.baselines import H2O, Ann, AnnIndex, AnnOptions, Quest, SnapKV, StreamingLLM, Twilight, served
from louver.experiments.baselines.selecting import num_kept, top
from louver.protocols import LayerAttention

TENTH = (
    "streaming:0.1",
    "h2o:0.1",
    "snapkv:0.1",
    "quest:0.1",
    "twilight:0.9",
    "hnsw:0.1",
    "ivf:0.1",
    "pq:0.1",
    "lsh:0.1",
)
HEADS, KV_HEADS, DIMS, SCALE = 4, 2, 16, 0.25


def tokens(n, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, KV_HEADS, n, DIMS, generator=generator) + torch.randn(
        1, KV_HEADS, 1, DIMS, generator=generator
    )
    return keys, torch.randn(batch, KV_HEADS, n, DIMS, generator=generator)


def a_query(batch=2, seed=1, length=1):
    return 2 * torch.randn(batch, HEADS, length, DIMS, generator=torch.Generator().manual_seed(seed))


def prompt(layer, n=70, kv_start=None, batch=2, chunks=1):
    """A prompt in chunks, its queries shown."""
    keys, values = tokens(n, batch)
    queries = a_query(batch, 5, n)
    for part in torch.arange(n).chunk(chunks):
        layer.append(keys[:, :, part], values[:, :, part])
        layer.observe(queries[:, :, part], kv_start, SCALE)
    return keys, values, queries


def weights_of(q, keys, kept):
    """Softmax weights over the kept positions, float64, for one query head."""
    logits = torch.stack([(q.double() @ keys[i].double()) * SCALE for i in kept])
    return dict(zip(kept, logits.softmax(0).tolist(), strict=True))


def steps(layer, n, count, kv_start=None, batch=2):
    """Decode count tokens after n; yields the query and the result with its mask."""
    layer.record = True
    for i in range(count):
        keys, values = tokens(1, batch, seed=100 + i)
        layer.append(keys, values)
        q = a_query(batch, 200 + i)[:, :, 0]
        yield q, layer.attend(q, SCALE, kv_start)


@pytest.mark.parametrize("spec", TENTH)
def test_what_is_selected_is_attended_exactly_and_promises_nothing(spec):
    layer = served(spec)(0)
    assert isinstance(layer, LayerAttention) and layer.guarantee == "none"
    prompt(layer)
    for q, result in steps(layer, 70, 2):
        keys, values = layer.store.keys, layer.store.values
        for row in range(2):
            for head in range(HEADS):
                kept = result.exact_mask[row, head].nonzero()[:, 0].tolist()
                share = weights_of(q[row, head], keys[row, head // 2], kept)
                out = sum(w * values[row, head // 2, i].double() for i, w in share.items())
                torch.testing.assert_close(result.out[row, head].double(), out, rtol=1e-4, atol=1e-5)
        assert torch.isinf(result.certificate).all() and torch.isinf(result.tau).all()
        together = result.exact_mask.unflatten(1, (KV_HEADS, -1)).any(2).sum(-1)
        assert torch.equal(result.stats.num_exact, together)


@pytest.mark.parametrize("spec", TENTH)
def test_handling_a_cache(spec):
    """Copies of a row answer alike, and a truncated cache answers as one that never saw the rest."""
    short, long = served(spec)(0), served(spec)(0)
    for layer in (short, long):
        prompt(layer)
    long.append(*tokens(9, seed=8))
    long.truncate(70)
    for layer in (short, long):
        layer.select_batch(torch.tensor([1, 1, 0]))
    (_, a), (_, b) = next(steps(short, 70, 1, batch=3)), next(steps(long, 70, 1, batch=3))
    assert torch.equal(a.exact_mask, b.exact_mask) and torch.equal(a.out, b.out)
    assert torch.equal(a.stats.bytes_read, b.stats.bytes_read)


def test_budgets():
    lengths = torch.tensor([1, 5, 100])
    assert num_kept(0.1, lengths).tolist() == [1, 1, 10] and num_kept(1.0, lengths).tolist() == [1, 5, 100]
    assert num_kept(8, lengths).tolist() == [1, 5, 8]
    assert top(torch.tensor([3.0, 1.0, 3.0, -torch.inf]), torch.tensor(2)).tolist() == [True, False, True, False]
    assert top(torch.tensor([3.0, -torch.inf]), torch.tensor(2)).tolist() == [True, False]
    for bad in ("quest:0", "quest:1.5", "quest:x", "quest", "magic:0.1", "twilight:1.1", "h2o:0.1:0.1", "hnsw:-1"):
        with pytest.raises(PolicyError):
            served(bad)
    assert served("quest:0.1", dense_layers=2)(1).budget == 1 and served("quest:0.1", dense_layers=2)(2).budget == 0.1


@pytest.mark.parametrize(("budget", "first", "last"), [(0.1, 4, 4), (3, 3, 0), (30, 4, 26)])
def test_streaming(budget, first, last):
    layer = StreamingLLM(budget)
    prompt(layer, kv_start=torch.tensor([0, 9]))
    for step, (_, result) in enumerate(steps(layer, 70, 3, torch.tensor([0, 9]))):
        for row, start in enumerate((0, 9)):
            end = 71 + step
            count = math.ceil(budget * (end - start)) if budget < 1 else budget
            kept = {*range(start, start + min(4, count)), *range(end - max(0, count - 4), end)}
            assert set(result.exact_mask[row, 0].nonzero()[:, 0].tolist()) == kept
            assert len(kept) == (first + last if not row and not step and budget >= 1 else count)


@pytest.mark.parametrize("chunks", [1, 3])
def test_h2o(chunks):
    n, budget, start = 40, 0.25, [0, 5]
    layer = H2O(budget)
    keys, _, queries = prompt(layer, n, torch.tensor(start), chunks=chunks)
    results = list(steps(layer, n, 6, torch.tensor(start)))
    keys = layer.store.keys
    for row in range(2):
        for kv_head in range(KV_HEADS):
            received, kept, mine = [0.0] * (n + 6), set(range(start[row], n)), range(2 * kv_head, 2 * kv_head + 2)
            for p in range(start[row], n):
                for head in mine:
                    for i, w in weights_of(
                        queries[row, head, p], keys[row, kv_head], list(range(start[row], p + 1))
                    ).items():
                        received[i] += w
            for step, (q, result) in enumerate(results):
                now = n + step
                kept.add(now)
                count = math.ceil(budget * (now + 1 - start[row]))
                recent = {i for i in kept if i > now - (count + 1) // 2}
                others = sorted(kept - recent, key=lambda i: -received[i])
                kept = recent | set(others[: count - len(recent)])
                for head in mine:
                    assert set(result.exact_mask[row, head].nonzero()[:, 0].tolist()) == kept
                    for i, w in weights_of(q[row, head], keys[row, kv_head], sorted(kept)).items():
                        received[i] += w


@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_snapkv(chunks):
    n, budget, window = 60, 0.4, 8
    layer = SnapKV(budget, window=window)
    keys, _, queries = prompt(layer, n, chunks=chunks)
    results = list(steps(layer, n, 3))
    for row in range(2):
        for kv_head in range(KV_HEADS):
            votes = [0.0] * n
            for head in (2 * kv_head, 2 * kv_head + 1):
                for p in range(n - window, n):
                    for i, w in weights_of(queries[row, head, p], keys[row, kv_head], list(range(p + 1))).items():
                        votes[i] += w
            smooth = [sum(votes[max(0, i - 2) : i + 3]) / 5 for i in range(n - window)]
            chosen = sorted(range(n - window), key=lambda i: -smooth[i])[: math.ceil(budget * n) - window]
            for step, (_, result) in enumerate(results):
                want = {*chosen, *range(n - window, n + step + 1)}
                assert set(result.exact_mask[row, 2 * kv_head].nonzero()[:, 0].tolist()) == want


@pytest.mark.parametrize("start", [[0, 0], [0, 21]])
def test_quest(start):
    layer = Quest(0.3)
    prompt(layer, 70, torch.tensor(start))
    for step, (q, result) in enumerate(steps(layer, 70, 12, torch.tensor(start))):
        end, keys = 71 + step, layer.store.keys
        for row in range(2):
            pages = [range(max(a, start[row]), min(a + 16, end)) for a in range(start[row] // 16 * 16, end, 16)]
            count = math.ceil(math.ceil(0.3 * (end - start[row])) / 16)
            for head in range(HEADS):
                mine = keys[row, head // 2]
                promise = [
                    sum(max(float(q[row, head, d] * mine[list(p), d].min()), float(q[row, head, d] * mine[list(p), d].max()))
                        for d in range(DIMS))
                    for p in pages[:-1]
                ]  # fmt: skip
                best = sorted(range(len(promise)), key=lambda i: -promise[i])[: count - 1]
                want = {i for p in [*best, len(pages) - 1] for i in pages[p]}
                assert set(result.exact_mask[row, head].nonzero()[:, 0].tolist()) == want


def test_quest_boxes_are_kept_and_charged():
    layer = Quest(0.3)
    prompt(layer, 70)
    first = next(r for _, r in steps(layer, 70, 1))
    assert first.stats.index_bytes.tolist() == [[5 * 2 * 2 * DIMS] * 2] * 2
    assert layer.memory_bytes()["index"] == 2 * 2 * KV_HEADS * 4 * DIMS * 4
    layer.truncate(20)
    fresh = Quest(0.3)
    fresh.append(*(x[:, :, :20] for x in (layer.store.keys, layer.store.values)))
    (_, a), (_, b) = next(steps(layer, 20, 1)), next(steps(fresh, 20, 1))
    assert torch.equal(a.exact_mask, b.exact_mask)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_twilight(p):
    layer = Twilight(p)
    prompt(layer, 40)
    for q, result in steps(layer, 40, 3):
        keys = layer.store.keys
        for row in range(2):
            for head in range(HEADS):
                mine = keys[row, head // 2]
                low, high = mine.amin(-1, keepdim=True), mine.amax(-1, keepdim=True)
                coded = low + torch.round((mine - low) / ((high - low) / 15)) * (high - low) / 15
                share = weights_of(q[row, head], coded, list(range(mine.shape[0])))
                want, total = set(), 0.0
                for i in sorted(share, key=lambda i: -share[i]):
                    if total >= p:
                        break
                    want.add(i)
                    total += share[i]
                assert set(result.exact_mask[row, head].nonzero()[:, 0].tolist()) == want
        assert (result.stats.index_bytes == mine.shape[0] * (DIMS // 2 + 4)).all()


def test_twilight_stays_within_its_base_selection():
    narrow, base = Twilight(0.99, budget=0.3), Quest(0.3)
    for layer in (narrow, base):
        prompt(layer, 70)
    (_, a), (_, b) = next(steps(narrow, 70, 1)), next(steps(base, 70, 1))
    assert not (a.exact_mask & ~b.exact_mask).any() and (a.exact_mask != b.exact_mask).any()


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "pq", "lsh"])
def test_ann_returns_what_the_librarys_own_search_returns(kind):
    import faiss

    layer = Ann(kind, 0.1)
    prompt(layer, 300)
    q, result = next(steps(layer, 300, 1))
    keys = layer.store.keys
    for row in range(2):
        for kv_head in range(KV_HEADS):
            data, asked = keys[row, kv_head].numpy(), q[row, 2 * kv_head : 2 * kv_head + 2].numpy()
            plain = {
                "hnsw": lambda: faiss.IndexHNSWFlat(DIMS, 32, faiss.METRIC_INNER_PRODUCT),
                "ivf": lambda: faiss.index_factory(DIMS, "IVF69,Flat", faiss.METRIC_INNER_PRODUCT),
                "pq": lambda: faiss.IndexPQ(DIMS, 16, 8, faiss.METRIC_INNER_PRODUCT),
                "lsh": lambda: faiss.IndexLSH(DIMS, 4 * DIMS),
            }[kind]()
            if kind == "hnsw":
                plain.hnsw.efConstruction, plain.hnsw.efSearch = 80, 128
            if kind == "ivf":
                plain.nprobe, plain.cp.min_points_per_centroid = 16, 1
            if kind == "pq":
                plain.pq.cp.min_points_per_centroid = 1
            plain.train(data)
            plain.add(data)
            found = plain.search(asked, math.ceil(0.1 * 301))[1]
            for g in range(2):
                mask = result.exact_mask[row, 2 * kv_head + g]
                assert set(mask.nonzero()[:, 0].tolist()) == set(found[g].tolist()) - {-1}
    assert (result.stats.index_bytes > 0).all() and layer.memory_bytes()["index"] > 0


def test_ann_grows_and_forgets():
    layer = Ann("ivf", 0.1)
    prompt(layer, 300)
    assert [r.exact_mask.shape[2] for _, r in steps(layer, 300, 3)] == [301, 302, 303]
    layer.truncate(200)
    assert next(steps(layer, 200, 1))[1].exact_mask.shape[2] == 201


def test_a_fine_enough_hnsw_finds_the_true_neighbours():
    keys = tokens(500)[0][0, 0]
    q = a_query()[0, :2, 0]
    index = AnnIndex(keys, AnnOptions(kind="hnsw", ef_search=500, ef_construction=400))
    truth = (q @ keys.T).topk(10).indices
    assert all(set(index.search(q, 10)[i].tolist()) == set(truth[i].tolist()) for i in range(2))
    compared, read = index.cost(q, 10)
    assert 10 <= compared <= 1000 and read > 0
    with pytest.raises(PolicyError, match="kind='kd' is unknown"):
        AnnOptions(kind="kd")
