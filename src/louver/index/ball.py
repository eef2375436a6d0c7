"""BallIndex: the paper's index. Small groups of keys in every subspace of the head dimension, each in a ball (or a box).

Source: Dehghankar and Asudeh, Sparse Attention as a Range Searching Problem, arXiv 2605.06763. Guarantee: exact, under the
rules SUM and TA (which find the same keys) for a threshold on the score, and AND for one threshold per subspace. The paper's
AND with thresholds guessed for a score is neither here nor exact. Cost: 28% of the cache's bytes with 16 subspaces and groups of
4; a search reads them all, and in full only the keys whose bound reaches the threshold. Recent keys wait in a buffer that
every search scans, so nothing is ever invisible.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from louver.errors import NonFiniteError, PolicyError, ShapeError
from louver.geometry.rounding import norm_above, score_slack
from louver.geometry.subspaces import Subspaces, subspaces
from louver.index.ball_row import BallConfig, BallRow, GroupBounds, cut, empty_row, fold
from louver.index.results import Selection
from louver.kernels import get_ops, resolve_backend
from louver.kernels.reference.bounds import summarize
from louver.kernels.reference.rows import exact_scores, row_lengths, to_rows, valid_rows
from louver.kv.device import DeviceStore
from louver.kv.history import history_of
from louver.protocols import BoundSummary, Guarantee, KVStore
from louver.shapes import Keys, PerQueryHead, PerRow, Query, Values, check_query, check_tau, group_heads

RULES = ("sum", "ta")


class BallIndex:
    """Groups of keys enclosed in balls, subspace by subspace, over a store that may grow."""

    guarantee: ClassVar[Guarantee] = "exact"

    def __init__(self, store: KVStore, *, config: BallConfig | None = None, backend: str = "auto") -> None:
        """Index a store. The index starts empty; ``refresh`` takes in what the store holds. backend: speed only."""
        self.store = store
        self.config = config or BallConfig()
        self.backend = resolve_backend(backend)
        self._asked_backend = backend
        self.rows: list[BallRow] = []
        self._split: Subspaces | None = None
        self._folded_start: Tensor | None = None
        self._seen = history_of(store).count

    @classmethod
    def build(
        cls,
        keys: Keys,
        values: Values | None = None,
        *,
        kv_start: PerRow | None = None,
        kv_len: PerRow | None = None,
        backend: str = "auto",
        **options,
    ) -> "BallIndex":
        """Index keys [batch, num_kv_heads, kv_len, head_dim], kept and not copied; options are BallConfig's fields.

        Row i holds the tokens kv_start[i] .. kv_len[i] (default: all). Everything but the last few tokens is grouped.

        Raises:
            ShapeError: shapes, dtypes or devices do not fit together.
            PolicyError: an option makes no sense.

        Example:
            >>> keys = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
            >>> index = BallIndex.build(keys, subspaces=16, group_len=4)
            >>> q = keys[:, [0, 0, 1, 1], 7]
            >>> int(index.search(q, torch.full((1, 4), 50.0), rule="ta").row(0, 0)[0][0])
            7
        """
        index = cls(DeviceStore.wrap(keys, values, kv_start, kv_len), config=BallConfig(**options), backend=backend)
        index.refresh()
        return index

    def refresh(self) -> None:
        """Fold in the buffers that are full; shorter ones stay and are scanned."""
        self._follow()
        keys, start, split = self.store.keys, self.store.kv_start, self.split
        if self._folded_start is None or not torch.equal(self._folded_start, start):
            self.rows = [empty_row(keys.shape[1], split, self.config, keys.device)] * keys.shape[0]
            self._folded_start = start.clone()
        self._cut(keys.shape[2])
        for i, (begin, end) in enumerate(zip(start.tolist(), self.store.kv_len.tolist(), strict=True)):
            waiting = end - begin - self.rows[i].num_folded
            if waiting >= max(self.config.buffer_len, self.config.group_len):
                whole = end - waiting % self.config.group_len
                self.rows[i] = fold(self.rows[i], keys[i, :, begin:whole], split, self.config)

    def _follow(self) -> None:
        """Forget the tokens that the store lost, or moved, while the index was not asked."""
        history, start = history_of(self.store), self.store.kv_start
        kept, self._seen = history.kept_since(self._seen), history.count
        if kept:
            self._cut(kept)
        elif kept == 0:  # other rows, perhaps of another shape
            self.rows, self._split, self._folded_start = [], None, None
        if self._folded_start is not None and not torch.equal(self._folded_start, start):
            self.rows, self._folded_start = [], None

    def _cut(self, kept: int) -> None:
        """Forget every token from position kept on, and past the end of its row."""
        ends = self.store.kv_len.clamp(max=kept).tolist()
        for i, (begin, end) in enumerate(zip(self.store.kv_start.tolist(), ends, strict=True)):
            if self.rows:
                keys = self.store.keys[i, :, begin:end]
                self.rows[i] = cut(self.rows[i], keys, max(0, end - begin), self.split, self.config)

    def search(self, q: Query, tau: PerQueryHead, rule: str | None = None) -> Selection:
        """Every key whose real score reaches tau [batch, num_q_heads]; extras only within the rounding slack.

        Args:
            q: [batch, num_q_heads, head_dim].
            tau: score units.
            rule: "sum" or "ta" (default: the config's). Speed only: both find the same keys.

        Raises:
            ShapeError: q is not [batch, num_q_heads, head_dim] for these keys, or tau does not match q.
            NonFiniteError: q is not finite, or tau is NaN.
        """
        check_query(q, self.store.keys)
        check_tau(tau, q)
        tau = tau.float()
        candidate = self.candidates(q, tau, rule or self.config.rule)
        place, x, k = self._survivors(q, candidate)
        scores, slack = _scored(x, k, q.shape[2])
        return self._selection(candidate, place, scores, ~(scores + slack < tau[place[0], place[1]]))

    def search_intersection(self, q: Query, tau_per_subspace: Tensor) -> Selection:
        """Every key with q_s . k_s >= tau_per_subspace[..., s] in all subspaces s: an intersection of halfspaces (rule AND).

        tau_per_subspace is [batch, num_q_heads, subspaces], score units. Extras only within the rounding slack. Subspaces are those of the index's slicing. A key that is not finite is returned.
        """
        check_query(q, self.store.keys)
        self._follow()
        wanted = (*q.shape[:2], self.split.count)
        if tau_per_subspace.shape != wanted:
            raise ShapeError(
                f"tau_per_subspace has shape {tuple(tau_per_subspace.shape)}; wanted [batch, num_q_heads, subspaces] = {wanted}"
            )
        if torch.isnan(tau_per_subspace).any():
            raise NonFiniteError(
                "tau_per_subspace holds NaN; every comparison with it would be false and every key lost"
            )
        tau = tau_per_subspace.float()
        candidate = self.candidates_in_all(q, tau)
        place, x, k = self._survivors(q, candidate)
        turned = 0.0
        if self.split.rotation is not None:
            turned = (self.split.rounding * norm_above(x) * norm_above(k))[:, None]
        scores, slack = _scored(self.split.split(x), self.split.split(k), self.split.width)
        inside = ~(scores + (slack + turned) < tau[place[0], place[1]]).any(-1)
        return self._selection(candidate, place, (x * k).sum(-1), inside)

    def candidates(self, q: Query, tau: PerQueryHead, rule: str) -> Bool[Tensor, "batch num_q_heads longest"]:
        """The keys a rule can't rule out, in row coordinates: what a search reads in full."""
        if rule not in RULES:
            raise PolicyError(f"rule={rule!r} is unknown; wanted 'sum' or 'ta'")
        ops = get_ops(self.backend)
        out = self._everything(q)
        for i, (row, bounds) in enumerate(self.row_bounds(q)):
            t = group_heads(tau, self.store.keys.shape[1])[i]
            keep = ops.sum_reaches(row.group, bounds.upper, bounds.total_slack, t)
            if rule == "ta":
                keep = keep & row.seen_by_ta(bounds, t)
            out[i, :, : row.num_folded] &= (keep | ~row.bounded[:, None]).flatten(0, 1)
        return out

    def candidates_in_all(self, q: Query, tau: Tensor) -> Bool[Tensor, "batch num_q_heads longest"]:
        """The keys whose bound reaches tau [batch, num_q_heads, subspaces] in every subspace, in row coordinates."""
        out = self._everything(q)
        for i, (row, bounds) in enumerate(self.row_bounds(q)):
            t = group_heads(tau, self.store.keys.shape[1])[i]
            inside = get_ops(self.backend).all_reach(row.group, bounds.upper, bounds.slack, t)
            out[i, :, : row.num_folded] &= (inside | ~row.bounded[:, None]).flatten(0, 1)
        return out

    def bounds(self, q: Query) -> tuple[Tensor, Tensor, Tensor]:
        """Estimates and half-widths of all folded keys' scores and where they hold: [batch, num_q_heads, folded] each."""
        self._follow()
        folded = max((row.num_folded for row in self.rows), default=0)
        estimate = torch.zeros(*q.shape[:2], folded, device=q.device)
        half_width = torch.zeros_like(estimate)
        known = torch.zeros_like(estimate, dtype=torch.bool)
        for i, (row, b) in enumerate(self.row_bounds(q)):
            place = (i, slice(None), slice(0, row.num_folded))
            estimate[place] = row.add_up(b.estimate).flatten(0, 1)
            half_width[place] = (row.add_up(b.half_width) + b.total_slack[..., None]).flatten(0, 1)
            known[place] = row.bounded.repeat_interleave(q.shape[1] // row.bounded.shape[0], 0)
        return estimate, half_width, known & torch.isfinite(estimate + half_width)

    def row_bounds(self, q: Query) -> Iterator[tuple[BallRow, GroupBounds]]:
        """Each row with the bounds of its groups, for those who want to look inside."""
        self._follow()
        grouped = group_heads(q, self.store.keys.shape[1])
        for i, row in enumerate(self.rows):
            begin = int(self.store.kv_start[i])
            yield row, row.bounds(grouped[i], self.store.keys[i, :, begin : begin + row.num_folded], self.split)

    def summarize(self, q: Query, softmax_scale: float, sinks: int = 0, recent: int = 0) -> BoundSummary:
        """The bounds of this query, for a policy."""
        check_query(q, self.store.keys)
        estimate, half_width, known = self.bounds(q)
        length, longest = row_lengths(self.store.kv_start, self.store.kv_len)
        index = torch.arange(estimate.shape[2], device=q.device)
        undecided = known & ((index >= sinks) & (index < (length - recent)[:, None]))[:, None]
        scores, slack = self._scores(q)
        decided = valid_rows(length, longest).expand(scores.shape).clone()
        decided[..., : undecided.shape[2]] &= ~undecided
        return summarize(estimate, half_width, undecided, scores - slack, decided, length, softmax_scale)

    @property
    def split(self) -> Subspaces:
        """How head_dim is split. Known as soon as there are keys; other keys, put there behind the index's back, may have another."""
        if self._split is None:
            keys = self.store.keys
            self.backend = resolve_backend(self._asked_backend, keys.device)
            self._split = subspaces(keys.shape[3], self.config.subspaces, self.config.slicing, self.config.seed)
        return self._split

    @property
    def bytes_per_search(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes of the index itself that one search reads, whatever it finds."""
        heads = self.store.keys.shape[1]
        per_row = [[row.search_bytes(self.split.width)] * heads for row in self.rows]
        return torch.tensor(per_row, dtype=torch.int64, device=self.store.keys.device).reshape(-1, heads)

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self._follow()
        self.store.truncate(kv_len)
        self._seen = history_of(self.store).count
        self._cut(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Row i becomes a copy of row ids[i]."""
        self._follow()
        self.store.select_batch(ids)
        self._seen = history_of(self.store).count
        if self.rows:
            self.rows = [self.rows[i] for i in ids.tolist()]
        if self._folded_start is not None:
            self._folded_start = self._folded_start[ids]

    def memory_bytes(self) -> int:
        """Bytes the index adds to the cache."""
        return sum(x.numel() * x.element_size() for row in self.rows for x in row.tensors())

    def _everything(self, q: Tensor) -> Bool[Tensor, "batch num_q_heads longest"]:
        length, longest = row_lengths(self.store.kv_start, self.store.kv_len)
        return valid_rows(length, longest).expand(-1, q.shape[1], -1).clone()

    def _scores(self, q: Query) -> tuple[Tensor, Tensor]:
        length, longest = row_lengths(self.store.kv_start, self.store.kv_len)
        scores, absolute = exact_scores(q, to_rows(self.store.keys, self.store.kv_start, length, longest))
        return scores, score_slack(absolute, q.shape[2])

    def _survivors(self, q: Query, candidate: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Row, query head and token of every candidate, in order; and their queries and keys, float32 [survivors, head_dim]."""
        keys = self.store.keys
        row, head, index = candidate.nonzero().unbind(1)
        token = index + self.store.kv_start[row]
        return (row, head, token), q[row, head].float(), keys[row, head // (q.shape[1] // keys.shape[1]), token].float()

    def _selection(
        self, candidate: Tensor, place: tuple[Tensor, Tensor, Tensor], scores: Tensor, kept: Tensor
    ) -> Selection:
        row, head, token = place
        batch, num_q_heads = candidate.shape[:2]
        count = (row * num_q_heads + head)[kept].bincount(minlength=batch * num_q_heads)
        return Selection(
            indptr=torch.nn.functional.pad(count.cumsum(0), (1, 0)),
            indices=token[kept],
            scores=scores[kept],
            num_scanned=group_heads(candidate, self.store.keys.shape[1]).any(2).sum(-1),
            num_keys=(self.store.kv_len - self.store.kv_start).clamp_min(0),
            num_q_heads=num_q_heads,
        )


def _scored(x: Tensor, k: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Scores over the last axis, one query a key, and their slack."""
    product = x * k
    return product.sum(-1), score_slack(product.abs().sum(-1), terms)
