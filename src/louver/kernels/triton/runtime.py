"""CUDA C++ compiled at run time (NVRTC) and launched on torch's stream, through the libraries torch brings; no toolkit needed."""

import ctypes
import struct
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver as triton_driver

from louver.errors import BackendError


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL | None:
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    beside_torch = Path(torch.__file__).parent.parent.glob(f"nvidia/**/{name}")
    for candidate in (name, *map(str, beside_torch)):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    return None


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(maxsize=1)
def launcher() -> Any:
    """cuLaunchKernel, told what its arguments are, so that plain numbers will do."""
    call = ctypes.CDLL("libcuda.so.1").cuLaunchKernel  # a handle of its own: driver()'s takes what ctypes makes of it
    call.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return call


def available() -> bool:
    """Whether kernels can be compiled here: a card with m16n8k16 products, and NVRTC."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and _nvrtc() is not None


def function(sources: tuple[str, ...], name: str, macros: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
    """Compile files of this folder, one after another, for the current device and return one of their kernels.

    Raises:
        BackendError: the compiler or the driver refused; the message holds its log.
    """
    return _function(torch.cuda.current_device(), sources, name, macros)


@lru_cache(maxsize=256)
def _function(
    device: int, sources: tuple[str, ...], name: str, macros: tuple[tuple[str, int], ...]
) -> ctypes.c_void_p:  # of one device: a kernel is loaded into its context
    nvrtc, cuda = _nvrtc(), driver()
    assert nvrtc is not None, "ask available() first"
    folder = Path(__file__).parent
    text = b"".join((folder / source).read_bytes() for source in ("common.cuh", *sources))
    major, minor = torch.cuda.get_device_capability(device)
    flags = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros)]
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, sources[-1].encode(), 0, None, None), "create")
    arguments = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
    status = nvrtc.nvrtcCompileProgram(program, len(flags), arguments)
    if status:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"{sources[-1]} did not compile ({' '.join(flags)}): {log.value.decode()}")
    size = ctypes.c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    image = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, image), "cubin")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    torch.cuda.current_stream()  # the driver needs torch's context
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), image), "load")
    _check(cuda.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()), "find")
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    static = ctypes.c_int()
    _check(cuda.cuFuncGetAttribute(ctypes.byref(static), 1, kernel), "ask about")  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    _check(cuda.cuFuncSetAttribute(kernel, 8, most - static.value), "configure")  # ..._MAX_DYNAMIC_SHARED_SIZE_BYTES
    return kernel


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...: may start while the stream's last kernel ends


@lru_cache(maxsize=64)
def starts_early(device: int) -> bool:
    """Whether a kernel can be launched on this device while its predecessor ends."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


_EARLY = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
_FORMATS = {ctypes.c_int: "i4x", ctypes.c_float: "f4x", ctypes.c_longlong: "q", ctypes.c_void_p: "Q"}


class _Arguments:
    """Memory for the arguments of a kernel, eight bytes each, and the pointers to them that the driver asks for."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.packed = struct.Struct(
            "=" + "".join(_FORMATS.get(kind, "Q") for kind in kinds)
        )  # any other kind: a tensor
        self.memory = ctypes.create_string_buffer(8 * len(kinds))
        first = ctypes.addressof(self.memory)
        self.pointers = (ctypes.c_void_p * len(kinds))(*(first + 8 * i for i in range(len(kinds))))


class _PerThread(threading.local):
    """A launch copies its arguments before it returns, so a thread can use their memory again; two threads can't share it."""

    def __init__(self) -> None:
        self.arguments: dict[tuple[type, ...], _Arguments] = {}


_per_thread = _PerThread()


def current_stream() -> int:
    """The handle of torch's current stream, by the way that Triton takes: ``torch.cuda.current_stream`` makes an object first."""
    active: Any = triton_driver.active
    return active.get_current_stream(active.get_current_device())


def launch(
    kernel: ctypes.c_void_p,
    grid: tuple[int, int],
    threads: int,
    arguments: list[Tensor | ctypes._SimpleCData],
    shared_bytes: int = 0,
    early: bool = False,
) -> None:
    """Launch on torch's current stream. Tensors pass their address, numbers are given as the ctypes of the parameter.

    ``early``: the kernel may start while the stream's last kernel ends, and waits for it itself (awaited() in common.cuh).
    """
    kinds = tuple(map(type, arguments))
    held = _per_thread.arguments.get(kinds)
    if held is None:
        held = _per_thread.arguments[kinds] = _Arguments(kinds)
    values = [a.data_ptr() if isinstance(a, Tensor) else a.value or 0 for a in arguments]
    held.packed.pack_into(held.memory, 0, *values)
    stream = current_stream()
    config = _Config(
        (*grid, 1),
        (threads, 1, 1),
        shared_bytes,
        stream,
        ctypes.pointer(_EARLY),
        int(early and starts_early(torch.cuda.current_device())),
    )
    _check(driver().cuLaunchKernelEx(ctypes.byref(config), kernel, held.pointers, None), "launch")


def in_host_memory(x: Tensor) -> bool:
    """Whether a CUDA tensor's memory is the host's, so that every byte read crosses the bus."""
    kind = ctypes.c_uint(0)
    _check(driver().cuPointerGetAttribute(ctypes.byref(kind), 2, ctypes.c_void_p(x.data_ptr())), "ask about")
    return kind.value == 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE: CU_MEMORYTYPE_HOST


def _check(status: int, what: str) -> None:
    if status:
        raise BackendError(f"CUDA could not {what} a kernel or its memory: error {status}")
