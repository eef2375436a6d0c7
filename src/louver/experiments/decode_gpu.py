"""Tokens per second of a whole model on a GPU over a long synthetic cache.

The model is a Llama of the size asked for with random weights, its cache ``heavy_tailed`` keys and values: what is measured is time, not
text. Two loops: transformers' own ``generate``, which launches every kernel of every token from Python, and a step captured in a CUDA
graph. Ways to attend: a policy of Louver's, over its growing buffers; ``dense`` over the same buffers (torch's attention in ``generate``, our
dense kernel in a graph); transformers' DynamicCache and StaticCache with its SDPA attention. Where torch may choose, it takes cuDNN,
which plans anew for every length; the rows with ``sdpa`` "flash" keep it from that. In ``generate`` the ways take turns, since its time is
the host's, and hosts are noisy.
"""

import gc
import statistics
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from louver.experiments.decode_graph import elapsed, in_graph
from louver.experiments.synthetic import heavy_tailed
from louver.integrations.transformers import attach

DYNAMIC, STATIC = "DynamicCache", "StaticCache"
DENSE = ("dense", DYNAMIC, STATIC)
FLASH = ", flash"  # behind a dense way: torch's flash attention, not what torch would choose
ROOM = 256  # tokens, for what is decoded
RUNS = 15  # turns of a loop whose time is the host's; its speed differs by half from one second to the next, whoever attends
SELDOM = 5  # turns of which one also has the ways that take four times as long


@dataclass(frozen=True, kw_only=True)
class Config:
    """One model and one length; every field changes results."""

    kv_len: int
    loop: str = "generate"
    ways: tuple[str, ...] = (DYNAMIC, DYNAMIC + FLASH, "dense", "dense" + FLASH, "budget:0.01", "exact:0.01")
    num_layers: int = 16
    hidden_size: int = 4096
    num_q_heads: int = 32
    num_kv_heads: int = 8
    new_tokens: int = 32
    seed: int = 0
    device: str = "cuda"


GRAPH_WAYS = (STATIC, "dense", "topk:20", "budget:0.01", "exact:0.01")
LONGEST_STATIC = 131072  # tokens up to which the slowest way is worth waiting for


def run(config: Config) -> list[dict]:
    """One row per way: milliseconds per token, tokens per second, and the speedup against the fastest dense way."""
    model = make_model(config)
    measured = {"generate": in_turn, "graph": one_by_one}[config.loop](model, config)
    rows = [row(way, figures, config) for way, figures in measured.items()]
    dense = [r["token_ms"] for r in rows if r["policy"].removesuffix(FLASH) in DENSE]
    return [r | {"speedup_vs_best_dense": min(dense) / r["token_ms"] if dense else None} for r in rows]


def row(way: str, figures: dict, config: Config) -> dict:
    """One way's row, but for what other ways are needed for."""
    return {
        "kv_len": config.kv_len,
        "policy": way,
        "loop": config.loop,
        "num_layers": config.num_layers,
        "num_q_heads": config.num_q_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.hidden_size // config.num_q_heads,
        "data": "heavy_tailed",
        "device": config.device,
        "token_ms": figures["token_ms"],
        "tokens_per_s": 1e3 / figures["token_ms"],
    } | figures


def backends(way: str) -> AbstractContextManager:
    """What torch may attend with."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if way.endswith(FLASH) else nullcontext()


def one_by_one(model: Any, config: Config) -> dict[str, dict]:
    """Every way's figures in a graph; one cache at a time."""
    measured = {}
    for way in config.ways:
        with backends(way):
            cache, arguments = filled(model, way.removesuffix(FLASH), config)
            measured[way] = in_graph(model, arguments, cache, config.kv_len, config.new_tokens)
        del cache, arguments
        gc.collect()  # graphs, layers and cache know one another, and hold most of a card
        if config.device == "cuda":
            torch.cuda.empty_cache()
    return measured


def in_turn(model: Any, config: Config) -> dict[str, dict]:
    """Every way's milliseconds per token in ``generate``, and how often one step's attention made the host wait (None where that is not known).

    Medians of the turns, p20 and p80; and the median of the ratios to the best dense way's time of the same turn.
    """
    caches = {}
    gc.collect()
    for way in config.ways:
        cache, arguments = filled(model, way.removesuffix(FLASH), config)
        caches[way] = cache, arguments, model.config._attn_implementation
        if config.device == "cuda":
            torch.cuda.empty_cache()  # all of them together fill most of a card

    def generate(way: str, tokens: int) -> float:
        cache, arguments, implementation = caches[way]
        model.set_attn_implementation(implementation)
        ids = torch.ones(
            1, cache.get_seq_length() + 1, dtype=torch.long, device=config.device
        )  # but for the last, in the cache
        options = arguments | {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with backends(way):
            return elapsed(lambda: model.generate(ids, **options), config.device) / tokens

    for way in config.ways:
        generate(way, 4)
    often = [way for way in config.ways if way not in DENSE] or config.ways
    turns = [
        {way: generate(way, config.new_tokens) for way in (often if i % SELDOM else config.ways)} for i in range(RUNS)
    ]
    best = [min((t for way, t in turn.items() if way.removesuffix(FLASH) in DENSE), default=None) for turn in turns]
    measured = {}
    for way in config.ways:
        times = sorted(turn[way] for turn in turns if way in turn)
        ratios = [
            dense / turn[way] for turn, dense in zip(turns, best, strict=True) if dense is not None and way in turn
        ]
        measured[way] = {
            "token_ms": statistics.median(times),
            "token_ms_p20": times[len(times) // 5],
            "token_ms_p80": times[len(times) - 1 - len(times) // 5],
            "num_turns": len(times),
            "turn_speedup": statistics.median(ratios) if ratios else None,
            "num_attention_syncs": syncs_of(caches[way][0], config),
        }
    return measured


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
    room = config.kv_len + (RUNS + 1) * config.new_tokens + ROOM
    louver = attach(model, policy="dense" if policy in DENSE else policy, reserve_tokens=room)
    cache, arguments = louver, louver.kwargs()
    if policy in (DYNAMIC, STATIC):
        model.set_attn_implementation("sdpa")
        cache = (
            DynamicCache(config=model.config) if policy == DYNAMIC else StaticCache(model.config, max_cache_len=room)
        )
        arguments = dict.fromkeys(arguments, cache)  # by what this transformers calls the argument
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
        if cache is louver:
            louver.served_layers[layer].attention.observe(data.metric_queries, None, data.q.shape[-1] ** -0.5)
    return cache, arguments


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
    parser.add_argument("--kv-lens", default="40000,131072", help="tokens in the cache when generate begins")
    parser.add_argument("--graph-kv-lens", default="40000,131072,262144", help="and when replays of a graph begin")
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--num-q-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the rows to this file")
    args = vars(parser.parse_args(arguments))
    rows: list[dict] = []
    path, lengths, in_graphs = args.pop("json"), args.pop("kv_lens"), args.pop("graph_kv_lens")
    loops = [("graph", GRAPH_WAYS, in_graphs), ("generate", Config(kv_len=1).ways, lengths)]
    for loop, ways, asked in loops:
        for kv_len in map(int, filter(None, asked.split(","))):
            taken = tuple(way for way in ways if way != STATIC or kv_len <= LONGEST_STATIC)
            for row in run(Config(kv_len=kv_len, loop=loop, ways=taken, **args)):
                rows.append(row)
                equal = f", {row['num_equal_tokens']} tokens equal" if row.get("num_equal_tokens") is not None else ""
                print(
                    f"{kv_len:>7} {loop:8s} {row['policy']:20s} {row['token_ms']:7.2f} ms a token, "
                    f"{row['speedup_vs_best_dense']:.2f} x the best dense{equal}",
                    flush=True,
                )
            if path:
                write_rows(path, rows, seed=0)


if __name__ == "__main__":
    main()
