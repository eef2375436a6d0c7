"""What an experiment is to the command line and the report: a Config, a run, and how its rows are shown.

The measuring itself lives in a module of its own (Config, run(config) -> rows). One file in ``catalog/`` describes it; from that
description ``louver experiment NAME`` gets its options (the Config's fields that have a help text), its table and its pictures, and
``louver report`` its section. Nothing else has to know of a new experiment.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from louver.experiments.chart import Chart, Pick, pick
from louver.experiments.journal import Journal
from louver.experiments.rows import Row
from louver.kernels import crossover

Progress = Callable[[str, int, int], None]  # stage, done, total
Outcome = tuple[
    list[dict[str, Any]], Mapping[str, Any]
]  # rows, and further entries of the file, such as rows_per_layer


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A Config field that is an option on the command line, under its own name.

    Types that can be read there: str, int, float, bool, Path, any of these or None, and tuple[X, ...] (separated by commas).
    """
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a result table: a field of the rows (or a function of a row), and how its values are written."""

    heading: str
    value: Pick
    spec: str = ""

    def cell(self, row: Row) -> str:
        """The text for one row; a figure that the row does not have is a dash."""
        value = pick(self.value, row)
        return "–" if value is None else format(value, self.spec)

    @property
    def is_number(self) -> bool:
        """Whether the column holds figures, which stand to the right."""
        return bool(self.spec)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment, described. ``finding`` says what the rows show and may use nothing but the rows."""

    name: str
    summary: str  # one line, for --help and the report
    claim: str  # what the paper says; empty where it says nothing
    config: type  # a frozen keyword-only dataclass; its fields made with ``option`` are options
    run: Callable[..., Outcome]  # run(config, on_progress), with a ``journal`` as well if it ``resumes``
    columns: tuple[Column, ...]
    finding: Callable[[Sequence[Row]], str]
    charts: tuple[Chart, ...] = ()
    caveat: str = ""  # why the two differ, or what can't be compared here
    resumes: bool = False  # it takes minutes to hours: an aborted run goes on from its journal
    timed: bool = False  # what it measures is time, so short caches are attended densely, as users have it
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings for `make experiments` without --full

    def measure(self, config: Any, on_progress: Progress = no_progress, journal: Journal | None = None) -> Outcome:
        """``run``; unless time is measured, every step goes through the policy it is to show, however short the cache."""
        more = {"journal": journal} if self.resumes and journal is not None else {}
        with crossover.switched(crossover.enabled and self.timed):
            return self.run(config, on_progress, **more)

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """The table, without its headings."""
        return [[column.cell(row) for column in self.columns] for row in rows]
