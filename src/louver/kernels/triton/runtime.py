"""CUDA C++ compiled at run time (NVRTC) and launched on torch's stream, through the libraries torch brings; no toolkit needed."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

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
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def available() -> bool:
    """Whether kernels can be compiled here: a card with m16n8k16 products, and NVRTC."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and _nvrtc() is not None


@lru_cache(maxsize=64)
def function(source: str, name: str, options: tuple[str, ...]) -> ctypes.c_void_p:
    """Compile a file of this folder for the current device and return one of its kernels.

    Raises:
        BackendError: the compiler or the driver refused; the message holds its log.
    """
    nvrtc, driver = _nvrtc(), _driver()
    assert nvrtc is not None, "ask available() first"
    folder = Path(__file__).parent
    text = (folder / "common.cuh").read_bytes() + (folder / source).read_bytes()
    major, minor = torch.cuda.get_device_capability()
    flags = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *options]
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None), "create")
    arguments = (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
    status = nvrtc.nvrtcCompileProgram(program, len(flags), arguments)
    if status:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"{source} did not compile ({' '.join(flags)}): {log.value.decode()}")
    size = ctypes.c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    image = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, image), "cubin")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    torch.cuda.current_stream()  # the driver needs torch's context
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), image), "load")
    _check(driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()), "find")
    return kernel


def launch(
    kernel: ctypes.c_void_p, grid: tuple[int, int], threads: int, arguments: list[Tensor | ctypes._SimpleCData]
) -> None:
    """Launch on torch's current stream. Tensors pass their address, numbers are given as the ctypes of the parameter."""
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _check(_driver().cuLaunchKernel(kernel, *grid, 1, threads, 1, 1, 0, stream, pointers, None), "launch")


def in_host_memory(x: Tensor) -> bool:
    """Whether a CUDA tensor's memory is the host's, so that every byte read crosses the bus."""
    kind = ctypes.c_uint(0)
    _check(_driver().cuPointerGetAttribute(ctypes.byref(kind), 2, ctypes.c_void_p(x.data_ptr())), "ask about")
    return kind.value == 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE: CU_MEMORYTYPE_HOST


def _check(status: int, what: str) -> None:
    if status:
        raise BackendError(f"CUDA could not {what} a kernel or its memory: error {status}")
