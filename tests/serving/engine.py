"""Engines that come and go within one process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that tests can look into the worker
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@contextmanager
def engine(folder: str, settings: dict | None, **options) -> Iterator:
    """A fresh engine; settings are the plug-in's, None for stock vLLM. Gone when the block ends."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        folder,
        dtype="float32",  # in which tokens can be compared at all
        enforce_eager=True,
        max_model_len=2048,
        disable_log_stats=False,  # for get_metrics
        additional_config={} if settings is None else {"louver": settings},
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
