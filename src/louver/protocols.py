"""The seams between Louver's parts, and nothing else.

Data flows one way through a decode step::

    index.bounds(q) -> BoundSummary -> policy.cuts -> Cuts -> a kernel -> AttendResult

Policies never see keys, kernels never see policies. To add a bound, implement KeyIndex; to add a rule for what a step
keeps, implement Policy; to add another way to serve a layer (a baseline, say), implement LayerAttention.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Guarantee = Literal["exact", "certified", "none"]


@dataclass(frozen=True, kw_only=True)
class BoundSummary:
    """Histograms of the bounds of the *undecided* keys, per row and query head: all a policy may look at.

    Undecided keys are those a sketch stands for. The keys a step attends exactly in any case (the open block, sinks, recent
    tokens, keys without a finite bound) are decided; they enter through ``decided_mass`` and ``lower_count`` only.
    Bin i holds bounds b with edges[i] > b >= edges[i + 1]; edges descend from +inf to -inf, in score units. Masses are in
    units of e^shift, shift in nats.
    """

    edges: Float[Tensor, "batch num_q_heads bins_plus_1"]
    upper_count: Int[Tensor, "batch num_q_heads bins"]  # undecided keys by upper bound
    lower_count: Int[Tensor, "batch num_q_heads bins"]  # all keys by lower bound; decided ones by their exact score
    upper_mass: Float[Tensor, "batch num_q_heads bins"]  # sum of e^(upper logit), binned by upper bound
    lower_mass: Float[Tensor, "batch num_q_heads bins"]  # sum of e^(lower logit), binned by upper bound
    decided_mass: Float[Tensor, "batch num_q_heads"]  # sum of e^logit over the decided keys
    best_lower: Float[Tensor, "batch num_q_heads"]  # the largest lower bound of any key, score units
    shift: Float[Tensor, "batch num_q_heads"]
    num_keys: Int[Tensor, " batch"]  # valid keys of the row
    softmax_scale: float
    sample: Float[Tensor, "batch num_q_heads size"] | None = (
        None  # exact scores of sampled keys; NaN: the row has fewer
    )
    retired_mass: Float[Tensor, "batch num_q_heads"] | None = (
        None  # last look only: upper mass of what was dropped unseen
    )


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Three thresholds on the upper bound, score units, [batch, num_q_heads].

    Precision policies (nothing dropped), unread <= fine <= exact: a key with upper bound >= exact is treated exactly; from fine
    to exact its second plane is read where there is one; below unread its value is not read.

    Retrieval policies: a key with upper bound < unread is dropped unseen; every other is scored, and dropped if its score is
    below exact. Most have unread = exact. With a rank, only the rank best exact scores are kept (ties within rounding too): the keys
    above ``fine``, at least rank of them, are scored first, and their rank-th best score raises the threshold for the rest.
    """

    unread: Float[Tensor, "batch num_q_heads"]
    fine: Float[Tensor, "batch num_q_heads"]
    exact: Float[Tensor, "batch num_q_heads"]
    rank: Int[Tensor, "batch num_q_heads"] | None = None


@dataclass(frozen=True, kw_only=True)
class CutRule:
    """A policy's choice in declarative form, so that a backend can resolve it inside its kernels (op ``resolve``).

    need = max(1, ceil(share * valid keys), count) keys per query head.
    drop=False: exact above the need-th highest upper bound; unread below the bound under which the mass is unread_mass or less.
    drop=True, tau set: keep the keys whose score reaches tau. drop=True, tau None: keep the need largest scores.
    """

    drop: bool
    share: float = 0.0
    count: int = 0
    tau: float | None = None
    unread_mass: float = 0.0


class Sample(NamedTuple):
    """A uniform random sample of a row's keys: how many, and the seed that chooses them."""

    size: int
    seed: int


@runtime_checkable
class Policy(Protocol):
    """What a decode step keeps. Pure tensor code: no ``.item()``, no shape that depends on data."""

    drops: ClassVar[bool]  # True: keys below the cut are dropped (retrieval). False: they keep an estimated weight.
    guarantee: ClassVar[Guarantee]  # what is proven: of the keys that are kept (exact), of mass or output (certified)

    @property
    def looks(self) -> int:
        """How often ``cuts`` is asked (1 for most).

        Before it is asked again the keys above ``fine`` are scored, which makes their bounds tight; before it is asked for the
        last time those above ``exact``, and keys that are still not scored then are retired: dropped, unseen.
        """
        ...

    @property
    def sample(self) -> "Sample | None":
        """The random keys whose scores the policy wants to see as ``summary.sample``; None: none."""
        ...

    @property
    def sinks(self) -> int:
        """First tokens of each row that are always exact."""
        ...

    @property
    def recent(self) -> int:
        """Last tokens of each row that are always exact."""
        ...

    def rule(self) -> CutRule | None:
        """The choice in declarative form; None where only ``cuts`` can say it (slower, never different in kind)."""
        ...

    def cuts(self, summary: BoundSummary) -> Cuts:
        """Choose the thresholds of this step from the bounds of this step."""
        ...

    @property
    def spec(self) -> str:
        """The canonical specification, such as ``exact:0.01+sinks:4``."""
        ...


COUNTS = ("keys", "blocks", "open", "scanned", "exact", "coarse", "value_blocks")


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one decode step read, counted per row and KV head (a key read for one head of a GQA group counts once).

    ``table`` holds the counts named in COUNTS: valid keys; closed blocks; keys of the open block; closed keys read in full
    because no bound ruled them out; closed keys attended exactly; closed keys attended through a sketched value; blocks
    whose value frame was read. Bytes are linear in them.
    """

    table: Int[Tensor, "batch num_kv_heads counts"]
    byte_weights: tuple[int, ...]
    head_dim: int
    drops: bool
    index_bytes: Int[Tensor, "batch num_kv_heads"] | None = None  # of an index that COUNTS do not describe

    def count(self, name: str) -> Int[Tensor, "batch num_kv_heads"]:
        """One of the counts named in COUNTS."""
        return self.table[..., COUNTS.index(name)]

    @property
    def num_keys(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Valid keys."""
        return self.count("keys")

    @property
    def num_scanned(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys read in full, those of the open block included."""
        return self.count("scanned") + self.count("open")

    @property
    def num_exact(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys attended exactly, with their full value."""
        return self.count("exact") + self.count("open")

    @property
    def num_coarse(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys attended through a sketched key and a sketched value."""
        return self.count("coarse")

    @property
    def num_unread(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys attended through a sketched key and the head's mean value."""
        rest = self.num_keys - self.num_exact - self.num_coarse
        return rest * 0 if self.drops else rest

    @property
    def bytes_read(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes of cache and index the step read."""
        cache = (self.table * self.table.new_tensor(self.byte_weights)).sum(-1)
        return cache if self.index_bytes is None else cache + self.index_bytes

    @property
    def bytes_dense(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes dense attention reads from a 16-bit cache."""
        return self.num_keys * 4 * self.head_dim

    @property
    def bytes_fraction(self) -> float:
        """Bytes read over bytes dense attention reads from a 16-bit cache."""
        return self.bytes_read.sum().item() / max(1, self.bytes_dense.sum().item())

    def fraction(self, name: str) -> float:
        """``"exact"``, ``"coarse"``, ``"unread"`` or ``"scanned"`` keys over valid keys."""
        return getattr(self, f"num_{name}").sum().item() / max(1, self.num_keys.sum().item())


@dataclass(frozen=True, kw_only=True)
class AttendResult:
    """The output of one decode step, with its evidence.

    The true output o (real arithmetic, over every stored key) obeys ``|o - out| <= certificate + arithmetic_bound`` in the
    Euclidean norm. ``tau``: no key whose true score reaches it was treated inexactly (+inf would be a promise about nothing).
    """

    out: Float[Tensor, "batch num_q_heads head_dim"]
    lse: Float[Tensor, "batch num_q_heads"]  # natural log of the sum of the weights used; float32
    stats: StepStats
    certificate: Float[Tensor, "batch num_q_heads"]  # inf where nothing is known about the values
    arithmetic_bound: Float[Tensor, "batch num_q_heads"]
    dropped_mass_bound: Float[Tensor, "batch num_q_heads"]  # 0 where nothing is dropped
    tau: Float[Tensor, "batch num_q_heads"]
    exact_mask: Tensor | None = None  # bool [batch, num_q_heads, kv_len], only when asked for


@runtime_checkable
class KVStore(Protocol):
    """Where the exact keys and values live. Rows are left-padded: row i holds valid tokens kv_start[i] .. kv_len."""

    @property
    def keys(self) -> Float[Tensor, "batch num_kv_heads kv_len head_dim"]: ...
    @property
    def values(self) -> Float[Tensor, "batch num_kv_heads kv_len head_dim"] | None: ...
    @property
    def kv_start(self) -> Int[Tensor, " batch"]: ...
    @property
    def kv_len(self) -> Int[Tensor, " batch"]: ...
    def append(self, keys: Tensor, values: Tensor | None) -> None:
        """Add tokens [batch, num_kv_heads, new_len, head_dim] at the end of every row."""
        ...

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        ...

    def select_batch(self, ids: Int[Tensor, " new_batch"]) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        ...

    def memory_bytes(self) -> int: ...


@runtime_checkable
class SelectionLike(Protocol):
    """The keys a search returned, ragged over rows batch * num_q_heads (compressed sparse rows)."""

    @property
    def indptr(self) -> Int[Tensor, " rows_plus_1"]: ...
    @property
    def indices(self) -> Int[Tensor, " selected"]: ...
    @property
    def scores(self) -> Float[Tensor, " selected"]: ...
    @property
    def num_scanned(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Keys read in full because no bound ruled them out."""
        ...


@runtime_checkable
class KeyIndex(Protocol):
    """Finds every key above a threshold. ``guarantee`` says whether "every" is proven."""

    guarantee: ClassVar[Guarantee]
    store: KVStore

    @property
    def bytes_per_search(self) -> Int[Tensor, "batch num_kv_heads"]:
        """Bytes of the index itself that one search reads, whatever it finds."""
        ...

    def refresh(self) -> None:
        """Take in the tokens the store gained since the last call."""
        ...

    def search(self, q: Tensor, tau: Tensor) -> "SelectionLike":
        """Every key of q's KV head whose score reaches tau [batch, num_q_heads]."""
        ...

    def summarize(self, q: Tensor, softmax_scale: float, sinks: int = 0, recent: int = 0) -> BoundSummary:
        """The bounds of this query, for a policy."""
        ...

    def truncate(self, kv_len: int) -> None: ...
    def select_batch(self, ids: Tensor) -> None: ...
    def memory_bytes(self) -> int: ...


@runtime_checkable
class LayerAttention(Protocol):
    """Serves the decode steps of one layer: Louver is one implementation, every baseline another.

    The caller appends tokens first and then either shows the prompt's queries (``observe``; the prompt itself is attended
    densely by the caller) or asks for the attention of one query per row (``attend``).
    """

    @property
    def kv_len(self) -> int:
        """Tokens held, padding included."""
        ...

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens [batch, num_kv_heads, new_len, head_dim]; return all keys and values held, as views."""
        ...

    def observe(self, queries: Tensor, kv_start: Tensor | None, softmax_scale: float) -> None:
        """See the queries [batch, num_q_heads, q_len, head_dim] of the q_len tokens appended last.

        kv_start int32 [batch] counts the padding tokens at the left of each row; None means none.
        """
        ...

    def attend(self, q: Tensor, softmax_scale: float, kv_start: Tensor | None = None) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim] over the tokens held."""
        ...

    def truncate(self, kv_len: int) -> None: ...
    def select_batch(self, ids: Tensor) -> None: ...
    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by name: ``keys_values`` and ``index``."""
        ...
