"""Decode attention on a GPU beside what torch offers: cold L2, CUDA graphs, interleaved replays, median with p20 and p80.

Every Louver row is checked in the same run: recall counted over all keys against float64 scores, the output error against float64
attention, and the certificate against that error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from louver.attention.fused import fused_step
from louver.experiments.capture import Capture
from louver.experiments.step_check import check
from louver.experiments.synthetic import Synthetic, heavy_tailed
from louver.index.sketch import SketchIndex
from louver.kernels import crossover, get_ops
from louver.kernels.ops import TierOutput
from louver.policies.spec import parse
from louver.protocols import StepStats
from louver.sketch.accounting import byte_weights
from louver.sketch.layout import SketchConfig

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
EAGER_REPEAT_TOKENS = 65536  # repeated KV of longer caches is only a way to run out of memory
FLUSH_BYTES = 256 << 20  # more than any L2


@dataclass(frozen=True, kw_only=True)
class Config:
    """One shape; every field but ``repetitions`` changes results."""

    kv_len: int
    policies: tuple[str, ...] = ("budget:0.01", "topk:20", "exact:0.01")
    batch: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float16"
    frame_len: int = 128
    seed: int = 0
    repetitions: int = 31
    capture: Path | None = (
        None  # its layers as rows of a batch, at its own length and shape, and never dispatched to dense
    )
    baselines: tuple[str, ...] = ("sdpa_flash", "sdpa_cudnn", "dense", "dense_fp8", "eager_grouped", "eager_repeat")


# What the README and the docs claim, in one run: lengths, batches, bfloat16, head dimensions, group sizes, a million keys.
SUITE: tuple[dict, ...] = (
    *({"kv_len": n} for n in (8192, 40000, 131072, 524288)),
    {"kv_len": 32768, "batch": 8},
    {"kv_len": 8192, "batch": 32},
    *({"kv_len": n, "dtype": "bfloat16"} for n in (40000, 131072)),
    {"kv_len": 131072, "head_dim": 64},
    {"kv_len": 131072, "head_dim": 256},
    {"kv_len": 131072, "num_q_heads": 8},
    {"kv_len": 131072, "num_q_heads": 56},
    {"kv_len": 131072, "head_dim": 64, "num_q_heads": 28, "num_kv_heads": 4},
    {"kv_len": 1 << 20},
)

# On both sides of where a step turns dense, none of them turned: what kernels/triton/crossover.py is fitted to.
_OTHER_WIDTHS = ((28, 4, 64), (9, 3, 64), (32, 8, 64), (8, 8, 128), (56, 8, 128), (16, 8, 256))
CROSSOVER: tuple[dict, ...] = tuple(
    shape | {"baselines": ("sdpa_flash", "sdpa_cudnn", "dense")}
    for shape in (
        *({"kv_len": n, "batch": b} for b in (1, 2, 4, 8, 16, 32, 64) for n in (1024, 2048, 4096, 8192, 16384)),
        *({"kv_len": n, "batch": b, "policies": ("relative:4",)} for b in (1, 4, 16, 64) for n in (4096, 16384)),
        *(
            {"kv_len": n, "batch": b, "num_q_heads": q, "num_kv_heads": kv, "head_dim": d}
            for q, kv, d in _OTHER_WIDTHS
            for b, n in ((1, 32768), (4, 8192), (8, 4096), (32, 1024), (32, 2048), (32, 4096))
        ),
    )
)


def captured(config: Config) -> tuple[Config, Synthetic, str]:
    """A capture's last query over its tokens, a layer a row; the shape it has, and the model it is of."""
    assert config.capture is not None
    capture = Capture.load(config.capture)
    layers, end = list(capture.layers.values()), int(capture.query_positions[-1]) + 1
    kind = {"dtype": DTYPES[config.dtype], "device": "cuda"}
    keys, values = (
        torch.stack([x[:, :end] for x in each]).to(**kind)
        for each in ([y.keys for y in layers], [y.values for y in layers])
    )
    queries = torch.stack([layer.queries for layer in layers]).to(**kind)
    shape = {"kv_len": end, "batch": len(layers), "num_q_heads": queries.shape[1], "num_kv_heads": keys.shape[1]}
    data = Synthetic(
        q=queries[:, :, -1].contiguous(), keys=keys, values=values, metric_queries=queries[:, :, capture.fitting()]
    )
    return replace(config, **shape, head_dim=keys.shape[3]), data, capture.model


def run(config: Config, dispatched: bool = True) -> Iterator[dict]:
    """Yield result rows: one per baseline and policy; ``dispatched``: to dense where that is faster."""
    with crossover.switched(dispatched and config.capture is None):
        yield from _run(config)


def _run(config: Config) -> Iterator[dict]:
    if config.capture is not None:
        config, data, source = captured(config)
    else:
        source = "heavy_tailed"
        data = heavy_tailed(
            config.kv_len,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            batch=config.batch,
            dtype=DTYPES[config.dtype],
            seed=config.seed,
            device="cuda",
        )
    q, keys, values, more = data.q, data.keys, data.values, data.metric_queries
    scale = config.head_dim**-0.5
    index = SketchIndex.build(keys, values, more, config=SketchConfig(frame_len=config.frame_len), backend="auto")
    runs: dict[str, Callable[[], object]] = _baselines(config, q, keys, values, index, scale)
    ops = get_ops("triton")
    store, sketch = index.store, index.sketch
    assert sketch is not None

    def decode(spec: str, record: bool = False) -> tuple[TierOutput, Tensor | None]:
        """A step, and bytes it read that its counts do not cover."""
        place = (store.kv_start, store.kv_len, scale)
        done = fused_step(parse(spec), ops, q, keys, values, sketch, place, keep_best=True, record=record)
        assert done is not None, f"{spec} can't be followed on a GPU"
        return done

    for spec in config.policies:
        runs[spec] = lambda spec=spec: decode(spec)
    times = interleaved(runs, config.repetitions)
    checked = {}
    for spec in config.policies:
        fast, index_bytes = decode(spec)
        checked[spec] = check(q, keys, values, fast, decode(spec, True)[0], scale, spec) | {"index_bytes": index_bytes}
    medians = {name: percentile(t, 50) for name, t in times.items()}
    dense = [medians[n] for n in ("sdpa_flash", "sdpa_cudnn", "dense") if n in medians]
    torchs = [medians[n] for n in ("sdpa_flash", "sdpa_cudnn") if n in medians]
    dense_bytes = 2 * keys.numel() * keys.element_size()
    for name, t in times.items():
        row = {
            "kv_len": config.kv_len,
            "batch": config.batch,
            "head_dim": config.head_dim,
            "num_q_heads": config.num_q_heads,
            "num_kv_heads": config.num_kv_heads,
            "dtype": config.dtype,
            "data": source,
            "device": torch.cuda.get_device_name(),
            "policy": name if name in config.policies else "dense",
            "index": "sketch" if name in config.policies else "none",
            "backend": "triton" if name in config.policies else name,
            "latency_us": percentile(t, 50),
            "latency_us_p20": percentile(t, 20),
            "latency_us_p80": percentile(t, 80),
            "speedup_vs_best_dense": min(dense) / medians[name],
            "speedup_vs_best_torch": min(torchs) / medians[name] if torchs else None,
            **{f"speedup_vs_{other}": medians[other] / medians[name] for other in config.baselines if other in medians},
        }
        if name in checked:
            result = checked[name]
            stats = StepStats(
                table=result.pop("counts"),
                byte_weights=byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, config.frame_len),
                head_dim=sketch.head_dim,
                drops=parse(name).drops,
                index_bytes=result.pop("index_bytes"),
            )
            row |= {"bytes_fraction": stats.bytes_fraction, "scanned_fraction": stats.fraction("scanned")}
            row |= {"live_fraction": stats.fraction("coarse"), "exact_fraction": stats.fraction("exact"), **result}
            row["gb_per_s"] = stats.bytes_fraction * dense_bytes / row["latency_us"] / 1e3
        else:
            share = 0.5 if name == "dense_fp8" else 1.0  # of the bytes of a 16-bit cache
            row |= {"bytes_fraction": share, "guarantee": "none" if share < 1 else "exact"}
            row["gb_per_s"] = share * dense_bytes / row["latency_us"] / 1e3
        yield row


def _baselines(config: Config, q: Tensor, keys: Tensor, values: Tensor, index: SketchIndex, scale: float) -> dict:
    dense, token = get_ops("triton").attend_dense, q[:, :, None]
    group = config.num_q_heads // config.num_kv_heads

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(token, keys, values, scale=scale, enable_gqa=True)

        return attend

    def eager_repeat() -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (keys, values))
        return torch.softmax((token @ k.mT) * scale, -1) @ v

    def eager_grouped() -> Tensor:
        grouped = q.unflatten(1, (config.num_kv_heads, group))
        return torch.softmax((grouped @ keys.mT) * scale, -1) @ values

    place = (index.store.kv_start, index.store.kv_len, scale)
    narrow = [x.to(torch.float8_e4m3fn) for x in (keys, values)] if "dense_fp8" in config.baselines else []
    made = {
        "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "dense": lambda: dense(q, keys, values, *place),
        "dense_fp8": lambda: dense(q, *narrow, *place),
        "eager_grouped": eager_grouped,
        "eager_repeat": eager_repeat,
    }
    too_long = config.batch * config.kv_len > EAGER_REPEAT_TOKENS
    return {n: f for n, f in made.items() if n in config.baselines and not (n == "eager_repeat" and too_long)}


def interleaved(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Microseconds of each call, captured in a graph, replayed in turn with a cold L2. A call that cannot run is left out."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    graphs = {}
    for name, call in runs.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:  # torch says so where a backend does not take a shape
            print(f"{name} cannot run here: {str(error).splitlines()[0]}")
            continue
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repetition in range(repetitions + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repetition >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def percentile(values: list[float], share: float) -> float:
    """The percentile of a list, by the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share / 100))]


def main(arguments: list[str] | None = None) -> None:
    """Run several lengths and write their rows; what ``louver bench --device cuda`` calls."""
    import argparse

    from louver.experiments.rows import write_rows

    parser = argparse.ArgumentParser(description="Decode attention on a GPU beside torch's, every row checked")
    parser.add_argument("--kv-lens", default="8192,40000,131072,524288")
    parser.add_argument("--policies", default="budget:0.01,topk:20,exact:0.01")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-q-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", action="store_true", help="every shape the docs show, whatever shape is given")
    parser.add_argument(
        "--crossover", action="store_true", help="shapes on both sides of where a step turns dense, none of them turned"
    )
    parser.add_argument(
        "--capture", type=Path, help="a capture whose layers are measured after the shapes, a layer a row"
    )
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    rows: list[dict] = []
    asked = {n: getattr(args, n) for n in ("batch", "num_q_heads", "num_kv_heads", "head_dim", "dtype")}
    shapes = [{"kv_len": int(n), **asked} for n in args.kv_lens.split(",")]
    shapes = SUITE if args.suite else CROSSOVER if args.crossover else shapes
    dispatched = crossover.enabled and not args.crossover
    shapes = [*shapes, *([{"kv_len": 0, "capture": args.capture}] if args.capture else [])]
    for shape in shapes:
        named = {"policies": tuple(args.policies.split(",")), "repetitions": args.repetitions, "seed": args.seed}
        config = Config(**named | shape)
        print(", ".join(f"{k}={v}" for k, v in shape.items()), flush=True)
        for row in run(config, dispatched):
            rows.append(row)
            name = row["policy"] if row["index"] == "sketch" else row["backend"]
            more = ""
            if "recall" in row:
                more = (
                    f" recall {row['recall']:.6f} lost {row['num_false_negatives']} error {row['output_error']:.4f}"
                    f" viol {row['num_bound_violations']} + {row['num_asked_violations']} scanned {row['scanned_fraction']:.3f} live {row['live_fraction']:.2f}"
                    f" bytes {row['bytes_fraction']:.3f}"
                )
            print(
                f"{row['kv_len']:>7} {name:12s} {row['latency_us']:8.1f} us [{row['latency_us_p20']:.1f}, {row['latency_us_p80']:.1f}]"
                f" x{row['speedup_vs_best_dense']:.2f} {row['gb_per_s']:.0f} GB/s{more}",
                flush=True,
            )
        torch.cuda.empty_cache()
        if args.json:
            write_rows(args.json, rows, seed=args.seed)


if __name__ == "__main__":
    main()
