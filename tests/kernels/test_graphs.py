"""What captures of two threads have in common, without a GPU: the collector."""

import gc
import threading

import pytest

pytest.importorskip("triton")
from louver.kernels.triton import graphs


def test_no_thread_lets_the_collector_run_while_another_captures():
    first_is_in, first_may_end, second_is_in = threading.Event(), threading.Event(), threading.Event()
    ran: list[bool] = []

    def first() -> None:
        with graphs._nothing_collected():
            first_is_in.set()
            first_may_end.wait(10)

    def second() -> None:
        first_is_in.wait(10)
        with graphs._nothing_collected():
            second_is_in.set()
            one.join(10)
            ran.append(gc.isenabled())

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    other.start()
    second_is_in.wait(0.2)  # it comes in early where nothing keeps it out
    first_may_end.set()
    one.join(10)
    other.join(10)
    assert ran == [False] and gc.isenabled()
