"""The part that is the same on every device: which rows of a batch are Louver's, and their attention.

vLLM sorts decode rows to the front of a batch (``reorder_batch_threshold = 1``). Those rows go through Louver; the rest of a mixed
batch goes to the stock backend with metadata of its own.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec

from louver.attention import PagedAttention, PagedRows
from louver.integrations.vllm.audit import audit
from louver.integrations.vllm.settings import Settings, settings_of
from louver.integrations.vllm.support import check_engine, check_layer, frame_len_for, left_to_vllm
from louver.integrations.vllm.totals import totals
from louver.sketch.layout import SketchConfig

logger = init_logger("vllm.louver")  # under vLLM's own logger, which decides what is shown


@dataclass
class Plan:
    """How one engine step's batch is shared out; the same for all layers of a KV cache group."""

    num_decodes: int  # rows, and tokens, at the front of the batch
    rows: PagedRows
    rest: Any  # the stock backend's metadata for the other rows; None where there are none


def asked_settings(config: VllmConfig | None) -> Settings | None:
    """The settings of an engine, None where it does not ask for Louver.

    Raises:
        UnsupportedModelError: it asks for Louver and for something Louver refuses.
        PolicyError: a setting can't be read.
    """
    settings = None if config is None else settings_of(config.additional_config)
    if settings is not None and config is not None:
        check_engine(
            kv_connector=config.kv_transfer_config is not None,
            decode_context_parallel=config.parallel_config.decode_context_parallel_size,
            cache_dtype=config.cache_config.cache_dtype,
            mla=config.model_config is not None and config.model_config.use_mla,
        )
    return settings


def wanted() -> bool:
    """Whether the engine that is being built asks for Louver."""
    return asked_settings(get_current_vllm_config_or_none()) is not None


class LouverBuilder:
    """Mixed into a stock metadata builder: adds the Plan of a step to its metadata, as the attribute ``louver``."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # pyright: ignore[reportCallIssue]
        # Layers with a sliding window have groups, and pages, of their own; vLLM serves them.
        full = isinstance(kv_cache_spec, FullAttentionSpec)
        self.louver = asked_settings(vllm_config) if full else None
        self._page_len = kv_cache_spec.block_size
        if self.louver is not None:
            frame_len_for(self._page_len, self.louver.frame_len)
            self.reorder_batch_threshold = 1

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """The stock metadata, with a Plan where Louver has rows to serve."""
        stock: Any = super()
        metadata = stock.build(common_prefix_len, common_attn_metadata, fast_build)
        if self.louver is not None:
            metadata.louver = self._plan(common_attn_metadata, lambda rest: stock.build(0, rest, fast_build))
            if line := totals.line_if_due(self.louver.log_interval_s):
                logger.info(line)
        return metadata

    def _plan(self, common: CommonAttentionMetadata, build: Any) -> Plan | None:
        assert self.louver is not None
        decodes, others, tokens, _ = split_decodes_and_prefills(
            common, treat_short_extends_as_decodes=common.is_prefilling is None
        )
        # Rows padded with no token at all, or with a causality of their own, are rarities for the stock backend.
        if common.max_seq_len < self.louver.min_tokens or tokens != decodes or common.causal is not True:
            decodes = 0
        totals.num_left_rows += common.num_reqs - decodes
        if not decodes:
            return None
        totals.num_steps += 1
        totals.num_mixed_steps += others > 0
        totals.num_rows += decodes
        rows = PagedRows.of(
            common.block_table_tensor[:decodes], common.seq_lens[:decodes], self._page_len, common.max_seq_len
        )
        return Plan(decodes, rows, build(_without(common, decodes)) if others else None)


def _without(common: CommonAttentionMetadata, decodes: int) -> CommonAttentionMetadata:
    """The batch without its first rows, each of which has one token."""
    rows, tokens = slice(decodes, common.num_reqs), slice(decodes, common.num_actual_tokens)
    per_row = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound", "req_idx")
    per_token = ("slot_mapping", "positions")
    cut = {name: getattr(common, name)[rows] for name in per_row if getattr(common, name) is not None}
    cut |= {name: getattr(common, name)[tokens] for name in per_token if getattr(common, name) is not None}
    return replace(
        common,
        query_start_loc=common.query_start_loc[decodes : common.num_reqs + 1] - decodes,
        query_start_loc_cpu=common.query_start_loc_cpu[decodes : common.num_reqs + 1] - decodes,
        num_reqs=common.num_reqs - decodes,
        num_actual_tokens=common.num_actual_tokens - decodes,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **cut,
    )


class LouverImpl:
    """Mixed into a stock AttentionImpl: serves the Plan's decode rows; the device's class says how pages are laid out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock: Any = self
        config = get_current_vllm_config_or_none()
        self._settings = asked_settings(config)
        self._paged: PagedAttention | None = None
        self._cache: tuple[int, torch.Size] | None = None  # the one that _paged is about
        reasons = left_to_vllm(
            sliding_window=stock.sliding_window not in (None, -1, (-1, -1)),
            attn_type=stock.attn_type,
            kv_sharing=stock.kv_sharing_target_layer_name is not None,
        )
        if self._settings is None or next(reasons, None) is not None:
            self._settings = None
            return
        check_layer(
            alibi=stock.alibi_slopes is not None,
            softcap=stock.logits_soft_cap,
            sinks=stock.sinks is not None,
        )

    def keys_and_values(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views [num_pages, num_kv_heads, page_len, head_dim] of the cache, with whatever strides it has."""
        raise NotImplementedError

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write as the stock backend does; what was written over is stale."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # pyright: ignore[reportAttributeAccessIssue]
        if self._paged is not None:
            self._paged.wrote(slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [tokens, num_q_heads, head_dim], written into output."""
        stock: Any = super()
        plan: Plan | None = getattr(attn_metadata, "louver", None)
        if plan is None or self._settings is None or output_scale is not None or output_block_scale is not None:
            return stock.forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        decodes, end = plan.num_decodes, attn_metadata.num_actual_tokens
        self._decode(layer, query[:decodes], kv_cache, plan.rows, output[:decodes])
        if plan.rest is not None:
            rest = slice(decodes, end)
            stock.forward(layer, query[rest], key[rest], value[rest], kv_cache, plan.rest, output[rest])
        return output

    def _decode(self, layer: Any, q: Tensor, kv_cache: Tensor, rows: PagedRows, output: Tensor) -> None:
        stock: Any = self
        assert self._settings is not None
        keys, values = self.keys_and_values(layer, kv_cache)
        paged = self._paged
        if paged is None or self._cache != (kv_cache.data_ptr(), kv_cache.shape):
            paged = self._start(keys, kv_cache)
        q = q.view(q.shape[0], stock.num_heads, stock.head_size)
        encoded = paged.pages.num_encoded
        result = paged.attend(q, keys, values, rows, stock.scale, record=self._settings.audit)
        output.view(q.shape).copy_(result.out)
        totals.add(result)
        totals.num_encoded_pages += paged.pages.num_encoded - encoded
        if self._settings.audit:
            audit(totals, result, q, keys, values, rows, stock.scale)

    def _start(self, keys: Tensor, kv_cache: Tensor) -> PagedAttention:
        """Allocate the sketches of pages the engine has allocated. Every page is stale until it is asked for."""
        settings = self._settings
        assert settings is not None
        self._cache = kv_cache.data_ptr(), kv_cache.shape
        num_pages, num_kv_heads, page_len, head_dim = keys.shape
        config = SketchConfig(frame_len=frame_len_for(page_len, settings.frame_len))
        self._paged = PagedAttention(
            settings.policy, num_pages, num_kv_heads, page_len, head_dim,
            device=keys.device, config=config, backend=settings.backend,
        )  # fmt: skip
        totals.num_pages += num_pages
        totals.memory_bytes += self._paged.memory_bytes()
        totals.cache_bytes += kv_cache.numel() * kv_cache.element_size()
        logger.info_once(
            "Louver decodes with %s, in blocks of %d tokens, on the %s kernels",
            self._paged.policy.spec,
            config.frame_len,
            self._paged.pages.backend,
        )
        return self._paged
