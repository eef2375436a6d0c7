"""What the ops of every backend hand to one another."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.protocols import BoundSummary


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of the sketched keys of every row, in row coordinates (index i is token kv_start + i), float32, score units.

    ``summary`` is for the policy; the rest is what the backend's own attend_tiers needs next, and may be held elsewhere or
    in another form by a backend that never materialises it.
    """

    estimate: Float[Tensor, "batch num_q_heads sketched"]
    half_width: Float[Tensor, "batch num_q_heads sketched"]
    undecided: Bool[Tensor, "batch num_kv_heads sketched"]  # False: past the row's end, or exact in any case
    summary: BoundSummary

    @property
    def upper(self) -> Float[Tensor, "batch num_q_heads sketched"]:
        """No real score exceeds this."""
        return self.estimate + self.half_width

    @property
    def lower(self) -> Float[Tensor, "batch num_q_heads sketched"]:
        """No real score is below this."""
        return self.estimate - self.half_width


@dataclass(frozen=True, kw_only=True)
class TierOutput:
    """A decode step's output and evidence; see louver.protocols.AttendResult for the meaning of each."""

    out: Float[Tensor, "batch num_q_heads head_dim"]
    lse: Float[Tensor, "batch num_q_heads"]
    certificate: Float[Tensor, "batch num_q_heads"]
    arithmetic_bound: Float[Tensor, "batch num_q_heads"]
    dropped_mass_bound: Float[Tensor, "batch num_q_heads"]
    tau: Float[Tensor, "batch num_q_heads"]
    counts: Int[Tensor, "batch num_kv_heads counts"]  # int64, louver.protocols.COUNTS
    exact_mask: Bool[Tensor, "batch num_q_heads kv_len"] | None = None


@dataclass(frozen=True, kw_only=True)
class ErrorTerms:
    """What each undecided key adds to the output certificate (docs/guarantee.md, 8), summed by the bins of a BoundSummary.

    Masses are in units of e^shift of that summary; terms are masses times norms of values.
    """

    coarse: Float[Tensor, "batch num_q_heads bins"]  # of a key attended with its sketched value
    unread: Float[Tensor, "batch num_q_heads bins"]  # of a key attended with the mean value
    mass: Float[Tensor, "batch num_q_heads bins"]  # the estimated weight
    exact_bytes: int  # what one exact key costs
    coarse_bytes: int  # what one coarse key costs
