"""What all policies share: sinks, recent tokens, and their specification."""

from dataclasses import dataclass
from typing import ClassVar

from louver.errors import PolicyError
from louver.kernels.reference.resolve import resolve
from louver.protocols import BoundSummary, CutRule, Cuts, Guarantee, Sample


@dataclass(frozen=True, kw_only=True)
class BasePolicy:
    """A policy is a frozen dataclass: the object is its configuration. sinks and recent change results."""

    name: ClassVar[str]
    drops: ClassVar[bool]
    guarantee: ClassVar[Guarantee] = "exact"  # what is proven of the keys it keeps, or of its output
    sinks: int = 0  # first tokens of each row that are always exact
    recent: int = 0  # last tokens of each row that are always exact

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise PolicyError(f"sinks={self.sinks} and recent={self.recent} must not be negative")
        for name, value in vars(self).items():
            if isinstance(value, int) and value >= 2**63 and name != "seed":
                raise PolicyError(f"{name}={value} is more keys than can be counted")
        self.check()

    def check(self) -> None:
        """Raise a PolicyError where a field makes no sense."""

    def argument(self) -> str:
        """What follows the name in the specification."""
        return ""

    @property
    def looks(self) -> int:
        """How often ``cuts`` is asked; most policies need one look at the bounds."""
        return 1

    @property
    def sample(self) -> Sample | None:
        """The random keys whose scores the policy wants to see; most want none."""
        return None

    @property
    def spec(self) -> str:
        """The canonical specification, such as ``exact:0.01+sinks:4``; ``parse`` reads it back."""
        parts = [self.name + (f":{self.argument()}" if self.argument() else "")]
        parts += [f"{field}:{getattr(self, field)}" for field in ("sinks", "recent") if getattr(self, field)]
        return "+".join(parts)

    def rule(self) -> CutRule | None:
        """The choice in declarative form; a policy that has none overrides ``cuts``."""
        return None

    def cuts(self, summary: BoundSummary) -> Cuts:
        """Choose the thresholds of this step from the bounds of this step."""
        rule = self.rule()
        if rule is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a rule nor cuts of its own")
        return resolve(rule, summary)

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True, kw_only=True)
class Dense(BasePolicy):
    """Attend every key exactly with the dense kernel: no sketch is read, and no bounds are asked for."""

    name: ClassVar[str] = "dense"
    drops: ClassVar[bool] = False
    guarantee: ClassVar[Guarantee] = "exact"


def number(value: float) -> str:
    """The shortest text that reads back as the same number; no trailing ``.0``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def check_fraction(name: str, value: float) -> None:
    """Raise unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise PolicyError(f"{name}={value} is not a share of the keys; wanted a number above 0 and at most 1")
