"""What a table of the documentation shows."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one result file, a column per (heading, field, format); a tuple in ``where`` names several values."""

    file: str
    columns: tuple[tuple[str, str, str], ...]
    where: dict[str, object] = field(default_factory=dict)
