"""A sequence of launches captured in a CUDA graph, which the host then launches as one.

Through the driver, and not as torch.cuda.CUDAGraph: a capture of torch's puts the random generator of the whole process into a state in which
another thread that draws a token meanwhile gets an error, and captures here happen in the middle of somebody's generation.
"""

import ctypes
import gc
import struct
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from louver.errors import BackendError
from louver.kernels import crossover as dispatch
from louver.kernels.triton import runtime
from louver.kernels.triton.launch import rounded
from louver.kernels.triton.step import serves

__all__ = ["Graph", "Place", "capture", "copying", "decided", "on", "place", "serves", "stays"]

R = TypeVar("R")
COPY_THREADS = 256
_WORDS = struct.Struct("=QQqQQq")  # of copy.cu
_copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage] - one launch for several tensors
# What torch.cuda's functions of these names come down to, without a look at whether CUDA is up.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
CAPTURE_MODE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_...: what other threads do meanwhile is their business


class Place(NamedTuple):
    """Where launches go. Those of one place follow one another, so its graphs share memory."""

    device: int
    stream: int
    thread: int


class _Pool:
    """The memory of the graphs of one place, and a stream to capture on."""

    def __init__(self) -> None:
        self.memory, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()


_pools: weakref.WeakValueDictionary[Place, _Pool] = weakref.WeakValueDictionary()  # as long as there are graphs


class Graph:
    """What was captured. Its memory is its place's, so it is replayed nowhere else."""

    def __init__(self, executable: ctypes.c_void_p, pool: _Pool, stream: int) -> None:
        self._executable, self._pool, self._stream = executable, pool, ctypes.c_void_p(stream)
        self._launch = runtime.driver().cuGraphLaunch
        weakref.finalize(self, runtime.driver().cuGraphExecDestroy, executable)  # one in flight ends first

    def replay(self) -> None:
        """Launch it on the stream of its place, whose device is the current one: 0, the default stream, is each device's own."""
        if status := self._launch(self._executable, self._stream):
            raise BackendError(f"CUDA could not launch a graph: error {status}")


def on(device: torch.device) -> AbstractContextManager:
    """The device as the current one."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def place(device: torch.device) -> Place | None:
    """Where a launch would go now, the device being the current one; None where nothing can be replayed."""
    if not _captures(device.index) or torch.cuda.is_current_stream_capturing():
        return None
    return Place(device.index, runtime.current_stream(), threading.get_ident())


def stays(at: Place) -> bool:
    """Whether launches still go there, and can be replayed: never while another device is the current one."""
    return (
        _current_device() == at.device
        and _current_stream(at.device) == at.stream
        and threading.get_ident() == at.thread
        and not _is_capturing()
    )


class Copying:
    """Copies one tensor or two by one launch, for 5 µs of the host where torch's copies take 10 each. For one place, hence one thread."""

    def __init__(self, at: Place) -> None:
        self._kernel = runtime.function(("copy.cu",), "copy_words", ())
        self._launch, self._stream = runtime.launcher(), at.stream
        self._memory = ctypes.create_string_buffer(_WORDS.size)
        first = ctypes.addressof(self._memory)
        self._pointers = (ctypes.c_void_p * 6)(*(first + 8 * i for i in range(6)))
        self._arguments = ctypes.addressof(self._pointers)

    def __call__(self, into: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Each of given into its fellow, which is contiguous and of its shape and dtype."""
        a, b = given[0], given[-1]
        from_a, from_b, words = a.data_ptr(), b.data_ptr(), a.nbytes // 4
        more = words if len(given) == 2 else 0
        plain = a.is_contiguous() and b.is_contiguous() and not (a.is_neg() or b.is_neg())
        if not plain or a.nbytes % 4 or (from_a | from_b) % 4:
            _copy_each(list(into), list(given))
            return
        _WORDS.pack_into(self._memory, 0, from_a, into[0].data_ptr(), words, from_b, into[-1].data_ptr(), more)
        blocks = (words + more + COPY_THREADS - 1) // COPY_THREADS
        if status := self._launch(
            self._kernel, blocks, 1, 1, COPY_THREADS, 1, 1, 0, self._stream, self._arguments, None
        ):
            raise BackendError(f"CUDA could not launch a copy: error {status}")


copying = Copying


@lru_cache(maxsize=16)
def _captures(device: int) -> bool:
    return runtime.available()


def decided(tokens: int) -> tuple[int, Hashable]:
    """What the host decides of a step by its length: up to how many tokens it stays the same, and the switches that it goes by."""
    return rounded(tokens), dispatch.enabled


def capture(body: Callable[[], R], at: Place) -> tuple[Graph, R]:
    """A graph of what body launches, and what body returned: tensors that every replay writes anew.

    Body is called twice: once for its work, so that all is compiled and loaded, and once to be captured.

    Raises:
        BackendError, RuntimeError: body does something that can't be captured.
    """
    body()
    pool = _pools.get(at)
    if pool is None:
        pool = _pools[at] = _Pool()
    stream, graph, executable = ctypes.c_void_p(pool.stream.cuda_stream), ctypes.c_void_p(), ctypes.c_void_p()
    driver = runtime.driver()
    with torch.cuda.stream(pool.stream), torch.cuda.use_mem_pool(pool.memory), _nothing_collected():
        _check(driver.cuStreamBeginCapture_v2(stream, CAPTURE_MODE_THREAD_LOCAL), "begin to capture")
        try:
            result = body()
        finally:
            status = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
        _check(status, "capture")
    _check(driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)), "instantiate")
    driver.cuGraphDestroy(graph)
    return Graph(executable, pool, at.stream), result


_capturing = threading.Lock()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What a collection frees, an event or another graph, may not be freed during a capture.

    The collector is the process's, so threads capture in turn: the first to end would let it run during another's capture.
    """
    with _capturing:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _check(status: int, what: str) -> None:
    if status:
        raise BackendError(f"CUDA could not {what} a graph: error {status}")
