"""What all policies share: sinks, recent tokens, their specification, and reading a histogram."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import PolicyError
from louver.protocols import BoundSummary, Cuts


@dataclass(frozen=True, kw_only=True)
class BasePolicy:
    """A policy is a frozen dataclass: the object is its configuration. sinks and recent change results."""

    name: ClassVar[str]
    drops: ClassVar[bool]
    sinks: int = 0  # first tokens of each row that are always exact
    recent: int = 0  # last tokens of each row that are always exact

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise PolicyError(f"sinks={self.sinks} and recent={self.recent} must not be negative")
        self.check()

    def check(self) -> None:
        """Raise a PolicyError where a field makes no sense."""

    def argument(self) -> str:
        """What follows the name in the specification."""
        return ""

    @property
    def spec(self) -> str:
        """The canonical specification, such as ``exact:0.01+sinks:4``; ``parse`` reads it back."""
        parts = [self.name + (f":{self.argument()}" if self.argument() else "")]
        parts += [f"{field}:{getattr(self, field)}" for field in ("sinks", "recent") if getattr(self, field)]
        return "+".join(parts)

    def cuts(self, summary: BoundSummary) -> Cuts:
        """Choose the thresholds of this step from the bounds of this step."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True, kw_only=True)
class Dense(BasePolicy):
    """Attend every key exactly with the dense kernel: no sketch is read, and no bounds are asked for."""

    name: ClassVar[str] = "dense"
    drops: ClassVar[bool] = False


def retrieval_cuts(
    tau: Float[Tensor, "batch num_q_heads"], rank: Int[Tensor, "batch num_q_heads"] | None = None
) -> Cuts:
    """One threshold: keys above it are exact, keys below it are dropped."""
    return Cuts(unread=tau, fine=tau, exact=tau, rank=rank)


def edge_above_which(
    count: Int[Tensor, "batch num_q_heads bins"],
    need: Int[Tensor, "batch num_q_heads"],
    edges: Float[Tensor, "batch num_q_heads bins_plus_1"],
) -> Float[Tensor, "batch num_q_heads"]:
    """The highest edge with at least ``need`` keys at or above it; -inf where there are fewer."""
    full_bins = (count.cumsum(-1) < need[..., None]).sum(-1, keepdim=True)
    return edges.gather(-1, (full_bins + 1).clamp_max(edges.shape[-1] - 1))[..., 0]


def share_of_keys(fraction: float, summary: BoundSummary) -> Int[Tensor, "batch num_q_heads"]:
    """ceil(fraction * valid keys), at least one, per query head."""
    keys = summary.num_keys.double()
    need = (keys * fraction - 1e-9).ceil().clamp_min(1).to(summary.num_keys.dtype)
    return need[:, None].expand(summary.edges.shape[:2])


def check_fraction(name: str, value: float) -> None:
    """Raise unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise PolicyError(f"{name}={value} is not a share of the keys; wanted a number above 0 and at most 1")
