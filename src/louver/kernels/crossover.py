"""The switch of every backend's dispatch to dense: below a measured length a sketch costs more than it saves, and a step is dense.

Speed only: a dense step keeps every key exactly, and its counts say so. Where the length lies is each backend's own to say. Off, every
step goes through the sketch, which is what tests of its machinery want, and whoever judges a policy: below the crossover none is
followed. ``LOUVER_CROSSOVER=off`` switches it off from the start.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

enabled = os.environ.get("LOUVER_CROSSOVER", "on") != "off"


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Dispatch on or off for a while."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before
