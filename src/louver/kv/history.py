"""What a store has taken away so far: how an index notices that tokens it knows were lost, or moved, while nobody asked it."""

from typing import NamedTuple

from louver.protocols import KVStore

_MOST = 32  # cuts told apart; of the oldest the lower counts for both


class History(NamedTuple):
    """Changes that took tokens away or moved rows, counted; appending is none."""

    count: int = 0
    cuts: tuple[tuple[int, int], ...] = ()  # (a change by its number, tokens it left), both ascending

    def cut(self, kept: int) -> "History":
        """The history with one change more, after which only positions below kept are what they were."""
        lower = [cut for cut in self.cuts if cut[1] < kept]
        if len(lower) >= _MOST:
            lower[:2] = [(lower[1][0], lower[0][1])]
        return History(self.count + 1, (*lower, (self.count + 1, kept)))

    def kept_since(self, count: int) -> int | None:
        """The position below which tokens are what they were after so many changes; None: all that were there still are."""
        return next((kept for change, kept in self.cuts if change > count), None)


def history_of(store: KVStore) -> History:
    """A store's own; a store that keeps none says nothing, and only the lengths of its rows tell."""
    return getattr(store, "history", History())
