"""How fast a step is, on a GPU, a CPU and in a server, and what the index takes."""

from shown.table import Table


def _cpu(file: str) -> Table:
    """What `louver bench --device cpu` stored: ratios only, since an absolute time says little about another processor."""
    columns = (
        ("keys", "kv_len", ","),
        ("what", "policy", ""),
        ("against our dense", "speedup_vs_dense", ".2f"),
        ("against SDPA", "speedup_vs_sdpa", ".2f"),
        ("against the best of torch", "speedup_vs_best_torch", ".2f"),
        ("bytes read", "bytes_fraction", ".1%"),
        ("output error", "output_error", ".2%"),
        ("recall", "recall", ""),
    )
    return Table(file=file, columns=columns, where={"backend": "cpu"})


TABLES = {
    "demo": Table(
        file="demo.json",
        columns=(
            ("policy", "policy", ""),
            ("prompt", "kv_len", ","),
            ("bytes read", "bytes_fraction", ".1%"),
            ("keys exact", "exact_fraction", ".1%"),
            ("tokens equal to dense", "num_equal_tokens", ""),
            ("mean output error", "output_error", ".2%"),
            ("mean KL, nats", "kl_nats", ".1e"),
            ("recall", "recall", ""),
            ("bounds violated", "num_bound_violations", ""),
        ),
        where={"guarantee": "certified"},
    ),
    "memory": Table(
        file="demo.json",
        columns=(
            ("policy", "policy", ""),
            ("prompt", "kv_len", ","),
            ("index / 16-bit cache", "index_memory_fraction_16bit", ".1%"),
        ),
        where={"guarantee": "certified"},
    ),
    "gpu": Table(
        file="speed_h100.json",
        columns=(
            ("keys", "kv_len", ","),
            ("policy", "policy", ""),
            ("µs", "latency_us", ".0f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
            ("against SDPA flash", "speedup_vs_sdpa_flash", ".2f"),
            ("against eager, KV repeated", "speedup_vs_eager_repeat", ".1f"),
            ("bytes read", "bytes_fraction", ".1%"),
            ("output error", "output_error", ".2%"),
            ("recall", "recall", ""),
        ),
        where={
            "kv_len": (8192, 40000, 131072, 524288),
            "batch": 1,
            "num_q_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "dtype": "float16",
            "backend": "triton",
        },
    ),
    "gpu-shapes": Table(
        file="speed_h100.json",
        columns=(
            ("keys", "kv_len", ","),
            ("batch", "batch", ""),
            ("heads", "num_q_heads", ""),
            ("KV heads", "num_kv_heads", ""),
            ("head_dim", "head_dim", ""),
            ("dtype", "dtype", ""),
            ("policy", "policy", ""),
            ("µs", "latency_us", ",.0f"),
            ("GB/s", "gb_per_s", ",.0f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
            ("recall", "recall", ""),
            ("bounds violated", "num_bound_violations", ""),
        ),
        where={"backend": "triton", "data": "heavy_tailed"},
    ),
    "gpu-dense": Table(
        file="speed_h100.json",
        columns=(
            ("keys", "kv_len", ","),
            ("kernel", "backend", ""),
            ("µs", "latency_us", ",.0f"),
            ("GB/s", "gb_per_s", ",.0f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
        ),
        where={
            "kv_len": (8192, 40000, 131072, 524288),
            "batch": 1,
            "num_q_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "dtype": "float16",
            "policy": "dense",
        },
    ),
    "gpu-capture": Table(
        file="speed_h100.json",
        columns=(
            ("keys", "kv_len", ","),
            ("policy", "policy", ""),
            ("kernel", "backend", ""),
            ("µs", "latency_us", ",.0f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
            ("bytes read", "bytes_fraction", ".1%"),
            ("output error", "output_error", ".2%"),
            ("recall", "recall", ""),
        ),
        where={"data": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    ),
    "gpu-certified": Table(
        file="certified_h100.json",
        columns=(
            ("keys", "kv_len", ","),
            ("data", "data", ""),
            ("policy", "policy", ""),
            ("µs", "latency_us", ",.0f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
            ("bytes read", "bytes_fraction", ".1%"),
            ("output error", "output_error", ".2%"),
            ("dropped mass", "dropped_mass", ".2%"),
            ("its bound", "dropped_mass_bound", ".2%"),
            ("bounds violated", "num_bound_violations", ""),
            ("asked for, not met", "num_asked_violations", ""),
        ),
        where={"backend": "triton"},
    ),
    "gpu-decode": Table(
        file="decode_h100.json",
        columns=(
            ("keys in the cache", "kv_len", ","),
            ("cache", "policy", ""),
            ("ms per token", "token_ms", ".2f"),
            ("tokens per second", "tokens_per_s", ".1f"),
            ("against dense", "speedup_vs_dense", ".2f"),
            ("host syncs of attention", "num_attention_syncs", ""),
        ),
    ),
    "gpu-decode-graph": Table(
        file="decode_graph_h100.json",
        columns=(
            ("keys in the cache", "kv_len", ","),
            ("cache", "policy", ""),
            ("ms per token", "token_ms", ".2f"),
            ("tokens per second", "tokens_per_s", ".1f"),
            ("against the best dense", "speedup_vs_best_dense", ".2f"),
            ("first tokens equal, of 32", "num_equal_tokens", ""),
        ),
    ),
    "cpu": _cpu("speed_cpu.json"),
    "cpu-131k": _cpu("speed_cpu_131k.json"),
    "cpu-narrow-float32": _cpu("speed_cpu_smollm2_f32.json"),
    "cpu-narrow-bfloat16": _cpu("speed_cpu_smollm2_bf16.json"),
    "cpu-capture": _cpu("speed_cpu_capture.json"),
    "cpu-avx512": _cpu("speed_cpu_avx512.json"),
    "cpu-avx512-131k": _cpu("speed_cpu_avx512_131k.json"),
    "cpu-avx512-narrow-float32": _cpu("speed_cpu_avx512_smollm2_f32.json"),
    "cpu-avx512-narrow-bfloat16": _cpu("speed_cpu_avx512_smollm2_bf16.json"),
    "cpu-certified": _cpu("speed_cpu_certified.json"),
    "cpu-prompt": Table(
        file="speed_cpu_prompt.json",
        columns=(
            ("tokens", "kv_len", ","),
            ("layers", "num_layers", ""),
            ("policy", "policy", ""),
            ("prefill, ms", "prefill_ms", ",.0f"),
            ("encoding, ms", "encode_ms", ",.0f"),
            ("of the prefill", "encode_share", ".1%"),
        ),
    ),
    "serving": Table(
        file="serving.json",
        columns=(
            ("policy", "policy", ""),
            ("requests", "batch", ""),
            ("tokens of each", "kv_len", ","),
            ("tokens/s, of stock", "speedup_vs_stock", ".2f"),
            ("bytes read", "bytes_fraction", ".1%"),
            ("values unread", "unread_fraction", ".1%"),
            ("sketch / cache", "index_fraction", ".1%"),
            ("tokens equal to stock", "equal_token_fraction", ".1%"),
        ),
    ),
}
