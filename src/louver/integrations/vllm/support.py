"""What Louver refuses inside vLLM, with the reason and the way out, and what it leaves to vLLM's own attention."""

from collections.abc import Iterator

from louver.errors import UnsupportedModelError

FRAME_LENS = (128, 64)


def check_engine(*, kv_connector: bool, decode_context_parallel: int, cache_dtype: str, mla: bool = False) -> None:
    """Raise an UnsupportedModelError unless the engine stores keys where and as Louver reads them."""
    for refused, reason in (
        (mla, "this model uses multi-head latent attention (MLA), whose cache holds no keys"),
        (
            kv_connector,
            "a KV connector (--kv-transfer-config) writes pages that no attention layer hears of; start vLLM without it",
        ),
        (
            decode_context_parallel > 1,
            f"--decode-context-parallel-size {decode_context_parallel} spreads a request's pages over ranks; use 1",
        ),
        (
            cache_dtype.startswith(("fp8", "int8", "nvfp4", "turboquant")),
            f"--kv-cache-dtype {cache_dtype}: Louver's bounds are about keys in 16 or 32 bits; use auto",
        ),
    ):
        if refused:
            raise UnsupportedModelError(f"Louver can't serve this engine: {reason}, or turn Louver off")


def check_layer(*, alibi: bool, softcap: float | None, sinks: bool) -> None:
    """Raise an UnsupportedModelError where a layer's attention is not plain softmax attention."""
    for refused, what in (
        (alibi, "position biases (ALiBi)"),
        (bool(softcap), "capped logits (softcap)"),
        (sinks, "attention sinks that are parameters"),
    ):
        if refused:
            raise UnsupportedModelError(
                f"Louver can't serve this model: its attention has {what}; turn Louver off for it"
            )


def left_to_vllm(*, sliding_window: bool, attn_type: str, kv_sharing: bool) -> Iterator[str]:
    """Why a layer is not Louver's business; nothing where it is."""
    if sliding_window:
        yield "it has a sliding window"
    if attn_type != "decoder":
        yield f"it is {attn_type} attention"
    if kv_sharing:
        yield "it reads another layer's keys"


def frame_len_for(page_len: int, asked: int | None) -> int:
    """Tokens per sketched block, for an engine whose pages hold page_len tokens.

    Raises:
        UnsupportedModelError: no supported length divides page_len.
    """
    for frame_len in FRAME_LENS if asked is None else (asked,):
        if page_len % frame_len == 0:
            return frame_len
    wanted = " or ".join(map(str, sorted(FRAME_LENS))) if asked is None else f"a multiple of {asked}"
    raise UnsupportedModelError(
        f"Louver can't serve this engine: its pages hold {page_len} tokens; start vLLM with --block-size {wanted}"
    )
