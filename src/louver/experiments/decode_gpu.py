"""Tokens per second of a whole model on a GPU over a long synthetic cache.

The model is a Llama of the size asked for with random weights, its cache ``heavy_tailed`` keys and values: what is measured is time, not
text. Two loops: transformers' own ``generate``, which launches every kernel of every token from Python, and a step captured in a CUDA
graph. Ways to attend: a policy of Louver's, over its growing buffers; ``dense`` over the same buffers (torch's attention in ``generate``, our
dense kernel in a graph); transformers' DynamicCache and StaticCache with its SDPA attention. Where torch may choose, it takes cuDNN,
which plans anew for every length; the rows with ``sdpa`` "flash" keep it from that.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from louver.experiments.synthetic import heavy_tailed
from louver.integrations.transformers import CapturedDecoding, attach
from louver.kernels.ops import TierOutput
from louver.protocols import COUNTS

DYNAMIC, STATIC = "DynamicCache", "StaticCache"
DENSE = ("dense", DYNAMIC, STATIC)
FLASH = ", flash"  # behind a dense way: torch's flash attention, not what torch would choose
ROOM = 256  # tokens, for what is decoded
RUNS = 5  # of a loop whose time is the host's


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
    rows = []
    for way in config.ways:
        rows.append(row(model, way, config))
        gc.collect()  # graphs, layers and cache know one another, and hold most of a card
        if config.device == "cuda":
            torch.cuda.empty_cache()
    dense = [r["token_ms"] for r in rows if r["policy"].removesuffix(FLASH) in DENSE]
    return [r | {"speedup_vs_best_dense": min(dense) / r["token_ms"] if dense else None} for r in rows]


def row(model: Any, way: str, config: Config) -> dict:
    """One way's row, but for what other ways are needed for."""
    policy = way.removesuffix(FLASH)
    flash = way != policy
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if flash else nullcontext():
        cache, arguments = filled(model, policy, config)
        measure = {"generate": in_generate, "graph": in_graph}[config.loop]
        measured = measure(model, arguments, cache, config)
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
        "token_ms": measured["token_ms"],
        "tokens_per_s": 1e3 / measured["token_ms"],
    } | measured


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


def in_generate(model: Any, arguments: dict[str, Any], cache: Any, config: Config) -> dict:
    """Milliseconds per token (median of RUNS, since hosts are noisy), and how often one step's attention made the host wait (None where that is not known)."""

    def generate(tokens: int) -> None:
        held = cache.get_seq_length()
        ids = torch.ones(1, held + 1, dtype=torch.long, device=config.device)  # all but the last are in the cache
        model.generate(ids, **arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    generate(4)
    times = [elapsed(lambda: generate(config.new_tokens), config.device) for _ in range(RUNS)]
    ms = statistics.median(times) / config.new_tokens
    return {"token_ms": ms, "num_attention_syncs": syncs_of(cache, config)}


def in_graph(model: Any, arguments: dict[str, Any], cache: Any, config: Config) -> dict:
    """Milliseconds per token of replays (median of three runs), and how far their logits are from those of the model's own loop."""
    first = torch.ones(1, dtype=torch.long, device=config.device)
    if isinstance(cache, StaticCache):
        decode = captured_static(model, arguments, first, config.kv_len)
        times = [elapsed(lambda: decode(config.new_tokens // 2), config.device) for _ in range(3)]
        return {"token_ms": statistics.median(times) / (config.new_tokens // 2), "num_equal_tokens": None}
    tokens, want = usual_steps(model, arguments, first, config.new_tokens)
    cache.crop(config.kv_len - cache.get_seq_length())
    decoding = CapturedDecoding(model, cache)
    got = torch.cat([decoding(token).clone() for token in tokens[:-1]])
    times = [elapsed(lambda: decoding.generate(first, config.new_tokens), config.device) for _ in range(3)]
    return {
        "token_ms": statistics.median(times) / config.new_tokens,
        **agreement(got.float(), want.float()),
        "num_tokens": config.new_tokens,
        "scanned_fraction": scanned(decoding.evidence),
    }


@torch.no_grad()
def usual_steps(model: Any, arguments: dict[str, Any], token: Tensor, new_tokens: int) -> tuple[list[Tensor], Tensor]:
    """What the model's own loop chooses after token, token included, and its logits [new_tokens, vocabulary]."""
    tokens, logits = [token], []
    for _ in range(new_tokens):
        logits.append(model(tokens[-1][:, None], **arguments).logits[:, -1].clone())
        tokens.append(logits[-1].argmax(-1))
    return tokens, torch.cat(logits)


def agreement(got: Tensor, want: Tensor) -> dict:
    """Of logits over the same tokens: equal choices, the largest difference, and the largest lead a choice lost (in deviations)."""
    best, same = want.topk(2).values, got.argmax(-1) == want.argmax(-1)
    lead = ((best[:, 0] - best[:, 1]) / want.std(-1))[~same]
    return {
        "num_equal_tokens": int(same.long().cumprod(0).sum()),
        "num_equal_choices": int(same.sum()),
        "logit_difference": float(((got - want).std(-1) / want.std(-1)).max()),
        "first_logit_difference": float((got - want)[0].std() / want[0].std()),
        "largest_lead_lost": float(lead.max()) if len(lead) else 0.0,
    }


def scanned(evidence: list[TierOutput | None]) -> float | None:
    """Keys read in full over valid keys, in a step of all layers; None where there is no evidence."""
    tables = [step.counts for step in evidence if step is not None]
    if not tables:
        return None
    counted = dict(zip(COUNTS, torch.cat(tables).sum((0, 1)).tolist(), strict=True))
    return (counted["scanned"] + counted["open"]) / counted["keys"]


@torch.no_grad()
def captured_static(model: Any, arguments: dict[str, Any], token: Tensor, held: int) -> Callable[[int], None]:
    """Greedy decoding over a StaticCache, whose length is on the device as it is, in a graph."""
    token, position = token[:, None].clone(), torch.full((1, 1), held, device=token.device)

    def step() -> None:
        logits = model(token, position_ids=position, **arguments).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        position.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def decode(new_tokens: int) -> None:
        for _ in range(new_tokens):
            graph.replay()

    decode(2)
    return decode


def elapsed(call: Callable[[], object], device: str) -> float:
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
