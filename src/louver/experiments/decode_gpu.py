"""Tokens per second of a whole model on a GPU over a long synthetic cache, in transformers' own ``generate``.

The model is a Llama of the size asked for with random weights, its cache ``heavy_tailed`` keys and values: what is measured is time, not
text. Dense attention is served by the same growing buffers (policy ``dense``), and by transformers' DynamicCache as it comes. The
model's own weights and launches are part of every token, so the gain is smaller than attention's alone; the row says how small.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from louver.experiments.synthetic import heavy_tailed
from louver.integrations.transformers import attach

DYNAMIC = "DynamicCache"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model and one length; every field changes results."""

    kv_len: int
    policies: tuple[str, ...] = (DYNAMIC, "dense", "budget:0.01", "exact:0.01")
    num_layers: int = 16
    hidden_size: int = 4096
    num_q_heads: int = 32
    num_kv_heads: int = 8
    new_tokens: int = 64
    seed: int = 0
    device: str = "cuda"


def run(config: Config) -> Iterator[dict]:
    """Yield one row per policy: milliseconds per token, tokens per second, and the speedup against ``dense``."""
    model = make_model(config)
    dense_ms = None
    for policy in config.policies:
        cache, arguments = filled(model, policy, config)
        ms, syncs = timed(model, arguments, cache, config)
        dense_ms = ms if policy == "dense" else dense_ms
        del cache, arguments
        yield {
            "kv_len": config.kv_len,
            "policy": policy,
            "num_layers": config.num_layers,
            "num_q_heads": config.num_q_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.hidden_size // config.num_q_heads,
            "data": "heavy_tailed",
            "device": config.device,
            "token_ms": ms,
            "tokens_per_s": 1e3 / ms,
            "speedup_vs_dense": None if dense_ms is None else dense_ms / ms,
            "num_attention_syncs": syncs,
        }


def make_model(config: Config) -> Any:
    """A Llama with random weights, float16 on a GPU."""
    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 7 // 2,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_q_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=32000,
        max_position_embeddings=1 << 21,
    )
    torch.manual_seed(config.seed)
    dtype = torch.float16 if config.device == "cuda" else torch.float32
    with torch.device(config.device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def filled(model: Any, policy: str, config: Config) -> tuple[Any, dict[str, Any]]:
    """A cache of kv_len synthetic tokens in every layer, and what ``generate`` is to be called with."""
    if policy == DYNAMIC:
        name = next(iter(attach(model, policy="dense").kwargs()))  # what this transformers calls the argument
        model.set_attn_implementation("sdpa")
        cache: Any = DynamicCache(config=model.config)
        arguments: dict[str, Any] = {name: cache}
    else:
        cache = attach(model, policy=policy, reserve_tokens=config.kv_len + 2 * config.new_tokens + 64)
        arguments = cache.kwargs()
    for layer in range(config.num_layers):
        data = heavy_tailed(
            config.kv_len,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_q_heads,
            dtype=model.dtype,
            seed=config.seed + layer,
            device=config.device,
        )
        cache.update(data.keys, data.values, layer)
        if policy != DYNAMIC:
            cache.layers[layer].attention.observe(data.metric_queries, None, data.q.shape[-1] ** -0.5)
    return cache, arguments


def timed(model: Any, arguments: dict[str, Any], cache: Any, config: Config) -> tuple[float, int | None]:
    """Milliseconds per token, and how often one step's attention made the host wait (None where that is not known)."""

    def generate(tokens: int) -> None:
        held = cache.get_seq_length()
        ids = torch.ones(1, held + 1, dtype=torch.long, device=config.device)  # all but the last are in the cache
        model.generate(ids, **arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    generate(4)
    return elapsed(lambda: generate(config.new_tokens), config.device) / config.new_tokens, syncs_of(cache, config)


def elapsed(call: Callable[[], None], device: str) -> float:
    """Milliseconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def syncs_of(cache: Any, config: Config) -> int | None:
    """How often an attention step over the filled cache waits for the device."""
    attention = getattr(cache.layers[0], "attention", None)
    if config.device != "cuda" or attention is None:
        return None
    head_dim = config.hidden_size // config.num_q_heads
    q = torch.randn(1, config.num_q_heads, head_dim, dtype=torch.float16, device="cuda")
    attention.attend(q, head_dim**-0.5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attention.attend(q, head_dim**-0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def main(arguments: list[str] | None = None) -> None:
    """Several lengths, rows printed and written; ``python -m louver.experiments.decode_gpu --help``."""
    import argparse

    from louver.experiments.rows import write_rows

    parser = argparse.ArgumentParser(description="Tokens per second of a random Llama over a long synthetic cache")
    parser.add_argument("--kv-lens", default="40000,131072", help="tokens in the cache when decoding begins")
    parser.add_argument("--policies", default=",".join(Config(kv_len=1).policies))
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--num-q-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the rows to this file")
    args = vars(parser.parse_args(arguments))
    rows: list[dict] = []
    path, lengths, policies = args.pop("json"), args.pop("kv_lens"), tuple(args.pop("policies").split(","))
    for kv_len in map(int, lengths.split(",")):
        for row in run(Config(kv_len=kv_len, policies=policies, **args)):
            rows.append(row)
            gain = "" if row["speedup_vs_dense"] is None else f", {row['speedup_vs_dense']:.2f} x dense"
            waits = "" if row["num_attention_syncs"] is None else f", {row['num_attention_syncs']} waits a layer"
            print(f"{kv_len:>7} {row['policy']:12s} {row['token_ms']:7.2f} ms a token{gain}{waits}", flush=True)
            if path:
                write_rows(path, rows, seed=0)


if __name__ == "__main__":
    main()
