"""What Louver did in this worker so far: counted on the device, read when a line is due."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from louver.protocols import COUNTS, AttendResult, StepStats


@dataclass
class Totals:
    """Counts over all decode steps of all layers of one worker."""

    table: Tensor | None = None  # int64, by louver.protocols.COUNTS
    like: StepStats | None = None  # for the bytes a count stands for
    num_steps: int = 0  # engine steps with at least one row decoded through Louver
    num_mixed_steps: int = 0  # of those, steps with other rows beside them
    num_rows: int = 0  # rows decoded through Louver, once per step
    num_left_rows: int = 0  # rows with several new tokens, or in short batches, that vLLM's own attention served
    num_decisions: int = 0  # audit: (query head, key) pairs checked by brute force
    num_relevant: int = 0  # audit: of those, keys whose true score reaches the step's tau
    num_false_negatives: int = 0  # audit: of those, not attended exactly
    num_bound_violations: int = 0  # audit: outputs further from the truth than their certificate
    num_encoded_pages: int = 0  # sketches made, over all layers; a page is sketched anew for every owner that fills it
    num_pages: int = 0  # over all layers
    memory_bytes: int = 0  # of all layers' sketches
    cache_bytes: int = 0  # of the caches they stand beside
    _logged: float = field(default_factory=time.monotonic)

    def add(self, result: AttendResult) -> None:
        """One layer's decode step."""
        counts = result.stats.table.sum((0, 1))
        self.table = counts if self.table is None else self.table + counts
        self.like = result.stats

    @property
    def stats(self) -> StepStats | None:
        """All decode steps as one; None before the first."""
        if self.table is None or self.like is None:
            return None
        like = self.like
        return StepStats(
            table=self.table.view(1, 1, len(COUNTS)),
            byte_weights=like.byte_weights,
            head_dim=like.head_dim,
            drops=like.drops,
        )

    def clear(self) -> None:
        """Count from zero again; the memory held stays."""
        held = {name: getattr(self, name) for name in ("num_pages", "memory_bytes", "cache_bytes")}
        self.__dict__.update(Totals(**held).__dict__)

    def line(self) -> str:
        """One line for a log."""
        stats = self.stats
        if stats is None:
            return f"Louver: no decode step yet, {self.num_left_rows} rows left to vLLM"
        share = ", ".join(f"{stats.fraction(name):.1%} {name}" for name in ("scanned", "exact", "coarse", "unread"))
        parts = [
            f"{self.num_rows} rows in {self.num_steps} steps decoded reading {stats.bytes_fraction:.1%} of dense bytes",
            f"keys: {share}",
            f"{self.num_left_rows} rows left to vLLM",
            f"sketches {self.memory_bytes / 2**20:.0f} MiB ({self.memory_bytes / max(1, self.cache_bytes):.0%} of the cache)",
        ]
        if self.num_decisions:
            parts.append(
                f"audit: {self.num_false_negatives} false negatives and {self.num_bound_violations} bound violations "
                f"in {self.num_decisions} decisions"
            )
        return f"Louver: {'; '.join(parts)}"

    def line_if_due(self, interval_s: float) -> str | None:
        """The line, where interval_s seconds have passed since the last one and something happened."""
        if time.monotonic() - self._logged < interval_s or not self.num_steps + self.num_left_rows:
            return None
        self._logged = time.monotonic()
        return self.line()


totals = Totals()
