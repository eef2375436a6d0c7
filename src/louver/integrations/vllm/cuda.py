"""Louver over vLLM's FlashAttention backend, as ``CUSTOM``. Written from vLLM's source and not run on a GPU inside vLLM.

The kernels it calls are tested on paged layouts by the project's own GPU tests. Only piecewise CUDA graphs: attention runs
eagerly between them, as the builder's default support level has it.
"""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from louver.integrations.vllm.decode import LouverBuilder, LouverImpl, wanted
from louver.integrations.vllm.support import FRAME_LENS


class LouverCUDAImpl(LouverImpl, FlashAttentionImpl):
    """Decode rows through Louver, everything else as FLASH_ATTN does it."""

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """A token's slot holds its key, then its value."""
        keys, values = kv_cache.split(self.head_size, -1)
        return keys, values


class LouverCUDABuilder(LouverBuilder, FlashAttentionMetadataBuilder):
    """FLASH_ATTN's metadata, with Louver's plan beside it."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None: a graph of a whole step would replay without asking Louver what the step may skip."""
        return AttentionCGSupport.NEVER


class LouverCUDABackend(FlashAttentionBackend):
    """FLASH_ATTN, extended, under the name vLLM keeps for others."""

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration that is free."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages that whole blocks of a sketch fill."""
        return [MultipleOf(min(FRAME_LENS))]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """False: a connector writes pages that no attention layer hears of."""
        return False

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Louver's implementation where the engine that is being built asks for it."""
        return LouverCUDAImpl if wanted() else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Louver's builder, which stands aside where it is not asked for."""
        return LouverCUDABuilder
