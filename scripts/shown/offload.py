"""The exact cache off the GPU."""

from shown.table import Table

TABLES = {
    "offload": Table(
        file="offload.json",
        columns=(
            ("keys", "kv_len", ","),
            ("policy", "policy", ""),
            ("keys and values", "store", ""),
            ("step, µs", "latency_us", ",.0f"),
            ("lookup, µs", "lookup_us", ".0f"),
            ("fetch, µs", "fetch_us", ".0f"),
            ("moved", "moved_fraction", ".1%"),
            ("on the GPU", "gpu_fraction", ".1%"),
            ("against streaming", "speedup_vs_streamed", ".1f"),
            ("against all on the GPU", "speedup_vs_resident", ".2f"),
            ("recall", "recall", ""),
            ("output error", "output_error", ".2%"),
        ),
    ),
    "retrievers": Table(
        file="quality_retrievers.json",
        columns=(
            ("method", "policy", ""),
            ("keys fetched", "exact_fraction", ".1%"),
            ("bytes read, index included", "bytes_fraction", ".3f"),
            ("right", "accuracy", ".1%"),
            ("from", "accuracy_low", ".1%"),
            ("to", "accuracy_high", ".1%"),
            ("same token as dense", "top1_agreement", ".1%"),
            ("KL, nats", "kl_nats", ".1e"),
        ),
        where={"task": "all", "kv_len": 1024},
    ),
    "retrieval-cpu": Table(
        file="offload_cpu.json",
        columns=(
            ("index", "index", ""),
            ("keys asked for", "policy", ""),
            ("lookup, µs", "lookup_us", ",.0f"),
            ("moved", "moved_fraction", ".1%"),
            ("recall", "recall", ".3f"),
            ("guarantee", "guarantee", ""),
        ),
        where={"kv_len": 40000, "store": "host"},
    ),
    "disk": Table(
        file="disk.json",
        columns=(
            ("policy", "policy", ""),
            ("dtype", "dtype", ""),
            ("layers", "num_layers", ""),
            ("keys per layer", "kv_len", ","),
            ("bytes on disk", "disk_bytes", ","),
            ("RssAnon, bytes", "rss_anon_bytes", ","),
            ("RssAnon / disk", "rss_anon_fraction", ".1%"),
            ("index / cache", "index_memory_fraction", ".1%"),
        ),
    ),
}
