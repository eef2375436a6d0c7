"""Louver over vLLM's CPU backend, under that backend's own name: vLLM has only one on a CPU."""

from functools import cache
from typing import Any

import torch
import vllm._custom_ops as custom_ops
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from louver.errors import UnsupportedModelError
from louver.integrations.vllm.decode import LouverBuilder, LouverImpl, wanted
from louver.integrations.vllm.support import check_engine


class LouverCPUImpl(LouverImpl, CPUAttentionBackendImpl):
    """Decode rows through Louver, everything else as CPU_ATTN does it."""

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """A page is two planes: keys [head_dim, page_len], then values [page_len, head_dim]."""
        check_layout(layer.isa, kv_cache.dtype, *kv_cache.shape[2:])
        return planes(kv_cache)


class LouverCPUBuilder(LouverBuilder, CPUAttentionMetadataBuilder):
    """CPU_ATTN's metadata, with Louver's plan beside it."""


class LouverCPUBackend(CPUAttentionBackend):
    """CPU_ATTN, extended. An engine that does not ask for Louver gets the stock implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Louver's implementation where the engine that is being built asks for it."""
        return LouverCPUImpl if wanted() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Louver's builder, which stands aside where it is not asked for."""
        return LouverCPUBuilder


class RefusedCPUMLABackend(CPUMLABackend):
    """CPU_MLA, but an engine that asks for Louver is told that it can't have both."""

    @staticmethod
    def get_impl_cls() -> Any:
        """The stock implementation, unless the engine asks for Louver."""
        refuse()
        return CPUMLABackend.get_impl_cls()


class RefusedAMXMLABackend(AMXMLABackend):
    """AMX_MLA, but an engine that asks for Louver is told that it can't have both."""

    @staticmethod
    def get_impl_cls() -> Any:
        """The stock implementation, unless the engine asks for Louver."""
        refuse()
        return AMXMLABackend.get_impl_cls()


def refuse() -> None:
    """Raise an UnsupportedModelError if the engine that is being built, whose model has no keys to read, asks for Louver."""
    if wanted():
        check_engine(kv_connector=False, decode_context_parallel=1, cache_dtype="auto", mla=True)


def planes(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of keys and values, each [num_pages, num_kv_heads, page_len, head_dim], of [..., page_len, 2 * head_dim]."""
    num_pages, num_kv_heads, page_len, width = kv_cache.shape
    head_dim = width // 2
    page, head, *_ = kv_cache.stride()
    shape = (num_pages, num_kv_heads, page_len, head_dim)
    start = kv_cache.storage_offset()
    keys = kv_cache.as_strided(shape, (page, head, 1, page_len), start)
    values = kv_cache.as_strided(shape, (page, head, head_dim, 1), start + page_len * head_dim)
    return keys, values


@cache
def check_layout(isa: str, dtype: torch.dtype, page_len: int, width: int) -> None:
    """Raise an UnsupportedModelError unless vLLM's kernels for this machine lay pages out as ``planes`` reads them.

    They write a page; the page is read back. Some instruction sets (AMX with bfloat16) pack keys in another way.
    """
    head_dim = width // 2
    pages = torch.zeros(2, 1, page_len, width, dtype=dtype)
    key, value = (
        torch.randn(page_len, 1, head_dim, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1)
    )
    halves = pages.view(2, 1, 2 * page_len, head_dim).chunk(2, dim=2)
    slots = torch.arange(page_len, 2 * page_len)
    custom_ops.cpu_attn_reshape_and_cache(
        key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    keys, values = planes(pages)
    if not (torch.equal(keys[1, 0], key[:, 0]) and torch.equal(values[1, 0], value[:, 0])):
        raise UnsupportedModelError(
            f"Louver can't serve this engine: vLLM's {isa!r} kernels pack keys of {dtype} in a way Louver doesn't read; "
            "start vLLM with --dtype float32 or float16, or turn Louver off"
        )
