"""Write the tables of README.md and docs/ from stored rows, so that no figure in them is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; TABLES says which rows and columns it shows.
A table named in benchmarks/expected.json puts rows beside the figures expected of them (scripts/expected.py).
Usage: python scripts/tables.py [--check]   (--check changes nothing and fails where a table is out of date, or where a stored
row says that a promise was broken: scripts/evidence.py)
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from expected import comparison
from grid import GRIDS, grid

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one result file, a column per (heading, field, format); a tuple in ``where`` names several values."""

    file: str
    columns: tuple[tuple[str, str, str], ...]
    where: dict[str, object] = field(default_factory=dict)


_HIDDEN = (
    ("task", "task", ""),
    ("hidden at each step", "hidden", ""),
    ("keys", "num_hidden", ""),
    ("share of keys", "hidden_fraction", ".1%"),
    ("right", "accuracy", ".1%"),
    ("from", "accuracy_low", ".1%"),
    ("to", "accuracy_high", ".1%"),
    ("same tokens", "top1_agreement", ".1%"),
    ("KL, nats", "kl_nats", ".1e"),
)


_ANSWERS = (
    ("method", "policy", ""),
    ("bytes read", "bytes_fraction", ".3f"),
    ("right", "accuracy", ".1%"),
    ("from", "accuracy_low", ".1%"),
    ("to", "accuracy_high", ".1%"),
    ("against dense", "accuracy_gain", "+.1%"),
    ("from", "accuracy_gain_low", "+.1%"),
    ("to", "accuracy_gain_high", "+.1%"),
    ("KL, nats", "kl_nats", ".1e"),
    ("guarantee", "guarantee", ""),
)


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


_BOUND = (
    ("index", "index", ""),
    ("rule", "rule", ""),
    ("keys wanted", "target_fraction", ".2%"),
    ("scanned", "scanned_fraction", ".1%"),
    ("bytes read", "bytes_fraction", ".3f"),
    ("index / cache", "index_bytes_fraction", ".3f"),
    ("work / dense", "work_fraction", ".2f"),
    ("guarantee", "guarantee", ""),
)

_AGREEMENT = (
    ("policy", "policy", ""),
    ("prompts", "num_prompts", ""),
    ("continued alike", "num_equal_prompts", ""),
    ("steps", "num_steps", ""),
    ("bytes read", "bytes_fraction", ".3f"),
    ("same token", "top1_agreement", ".1%"),
    ("KL, nats", "kl_nats", ".1e"),
    ("largest", "kl_nats_max", ".1e"),
    ("outputs checked", "num_checked", ","),
    ("violated", "num_bound_violations", ""),
    ("missed", "num_asked_violations", ""),
)
TABLES = {
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
    "perplexity": Table(
        file="tune.json",
        columns=(
            ("policy of every layer", "policy", ""),
            ("tokens predicted", "num_steps", ","),
            ("bytes read", "bytes_fraction", ".3f"),
            ("perplexity", "perplexity", ".4f"),
            ("of dense attention", "perplexity_dense", ".4f"),
            ("KL, nats", "kl_nats", ".1e"),
            ("p99", "kl_nats_p99", ".1e"),
            ("same token", "top1_agreement", ".1%"),
        ),
        where={"stage": "all layers alike"},
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
    "cpu": _cpu("speed_cpu.json"),
    "cpu-131k": _cpu("speed_cpu_131k.json"),
    "cpu-narrow-float32": _cpu("speed_cpu_smollm2_f32.json"),
    "cpu-narrow-bfloat16": _cpu("speed_cpu_smollm2_bf16.json"),
    "cpu-capture": _cpu("speed_cpu_capture.json"),
    "false-negatives": Table(
        file="false_negatives.json",
        columns=_HIDDEN,
        where={"hidden": ("nothing", "relevant", "separator", "other item", "first token")},
    ),
    "cliff": Table(
        file="false_negatives.json",
        columns=_HIDDEN,
        where={"task": ("recall", "sum"), "hidden": ("irrelevant", "relevant and irrelevant", "random")},
    ),
    "quality": Table(file="quality.json", columns=_ANSWERS, where={"task": "all", "kv_len": None}),
    "quality-8k": Table(
        file="quality.json",
        columns=(("task", "task", ""), *_ANSWERS[:5], ("an interval that tells", "is_verdict", "")),
        where={
            "kv_len": 8192,
            "task": ("single-needle", "number-needle", "multi-key", "documents", "quote", "tracking"),
            "policy": ("dense", "exact:0.01", "streaming:0.35", "h2o:0.35", "snapkv:0.35"),
        },
    ),
    "quality-4k": Table(
        file="quality.json",
        columns=(("task", "task", ""), *_ANSWERS[:5], ("an interval that tells", "is_verdict", "")),
        where={
            "kv_len": 4096,
            "task": ("single-needle", "number-needle", "multi-key", "documents", "quote"),
            "policy": ("dense", "exact:0.01", "streaming:0.35", "h2o:0.35", "snapkv:0.35"),
        },
    ),
    "agreement": Table(file="agreement.json", columns=_AGREEMENT),
    "agreement-gpu": Table(file="agreement_gpu.json", columns=_AGREEMENT),
    "perplexity-methods": Table(
        file="perplexity.json",
        columns=(
            ("method", "policy", ""),
            ("bytes read", "bytes_fraction", ".3f"),
            ("perplexity", "perplexity", ".3f"),
            ("change", "perplexity_change", "+.2%"),
            ("from", "perplexity_change_low", "+.2%"),
            ("to", "perplexity_change_high", "+.2%"),
            ("KL, nats", "kl_nats", ".1e"),
            ("p99", "kl_nats_p99", ".1e"),
            ("same token", "top1_agreement", ".1%"),
            ("guarantee", "guarantee", ""),
        ),
    ),
    "policies": Table(
        file="policies.json",
        columns=(
            ("policy", "policy", ""),
            ("bytes read", "bytes_fraction", ".3f"),
            ("selected", "selected_fraction", ".2%"),
            ("CV", "selected_cv", ".2f"),
            ("CV, seeds", "selected_cv_over_seeds", ".2f"),
            ("mean error", "output_error", ".2%"),
            ("bound", "output_error_bound_median", ".2g"),
            ("mass dropped", "dropped_mass", ".2%"),
            ("bound on it", "dropped_mass_bound", ".2%"),
            ("violated", "num_bound_violations", ""),
            ("missed", "num_asked_violations", ""),
            ("guarantee", "guarantee", ""),
        ),
    ),
    "policies-curve": Table(
        file="policies_curve.json",
        columns=(
            ("policy", "policy", ""),
            ("bytes read", "bytes_fraction", ".3f"),
            ("mean error", "output_error", ".2%"),
            ("p99", "output_error_p99", ".2%"),
            ("bounds violated", "num_bound_violations", ""),
        ),
    ),
    "fitting": Table(
        file="fitting.json",
        columns=(
            ("choice", "policy", ""),
            ("bytes read", "bytes_fraction", ".3f"),
            ("mean error", "output_error", ".2%"),
            ("p99", "output_error_p99", ".2%"),
            ("bounds violated", "num_bound_violations", ""),
        ),
    ),
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
    "oracle-and": Table(
        file="pruning_slicing.json",
        columns=(
            ("slices", "slicing", ""),
            ("true top that sets the thresholds", "target_fraction", ".2%"),
            ("scanned by the oracle AND", "scanned_fraction", ".1%"),
            ("bytes read", "bytes_fraction", ".3f"),
            ("keys whose slices all pass", "joint_pass_fraction", ".2%"),
            ("product of the slices' pass rates", "product_pass_fraction", ".2%"),
        ),
        where={"rule": "oracle-and"},
    ),
    "paper-grid": Table(
        file="pruning_grid.json",
        columns=_BOUND,
        where={"subspaces": (None, 16), "group_len": (None, 4)},
    ),
    "families": Table(
        file="pruning_families.json",
        columns=(
            ("groups by", "grouping", ""),
            ("enclosure", "enclosure", ""),
            *(column for column in _BOUND if column[0] not in ("index", "keys wanted")),
            ("build, ms", "build_ms", ",.0f"),
            ("query, µs", "query_us", ",.0f"),
        ),
        where={"target": "0.01"},
    ),
    "growth": Table(
        file="growth.json",
        columns=(
            ("keys", "kv_len", ","),
            ("fixed", "setting", ""),
            ("groups", "num_groups", ","),
            ("keys per group", "group_len", ""),
            ("scanned", "scanned_fraction", ".1%"),
            ("keys scanned", "scanned_keys", ",.0f"),
            ("work / dense", "work_fraction", ".2f"),
        ),
    ),
    "metric-power": Table(
        file="pruning_codecs.json",
        columns=(
            ("code", "codec", ""),
            ("metric", "metric", ""),
            ("keys wanted", "target_fraction", ".2%"),
            ("scanned", "scanned_fraction", ".1%"),
            ("bytes read", "bytes_fraction", ".3f"),
        ),
        where={"planes": 1, "metric": "full"},
    ),
    "sum": Table(
        file="pruning_slicing.json",
        columns=(
            ("slices", "slicing", ""),
            ("keys wanted", "target_fraction", ".2%"),
            ("scanned by SUM", "scanned_fraction", ".1%"),
            ("bytes read", "bytes_fraction", ".3f"),
            ("keys lost", "num_false_negatives", ""),
        ),
        where={"rule": "sum"},
    ),
    "ball": Table(
        file="demo_ball.json",
        columns=(
            ("index", "index", ""),
            ("policy", "policy", ""),
            ("prompt", "kv_len", ","),
            ("bytes read", "bytes_fraction", ".1%"),
            ("keys scanned", "scanned_fraction", ".1%"),
            ("tokens equal to dense", "num_equal_tokens", ""),
            ("to the flat index", "num_equal_tokens_flat", ""),
            ("mean output error", "output_error", ".2%"),
            ("recall", "recall", ""),
            ("bounds violated", "num_bound_violations", ""),
        ),
    ),
}


def render(table: Table) -> str:
    """The table in Markdown, with the device and the command its rows came from."""
    document = json.loads((RESULTS / table.file).read_text(encoding="utf-8"))
    rows = [r for r in document["rows"] if all(_is(r.get(key), value) for key, value in table.where.items())]
    lines = ["| " + " | ".join(heading for heading, _, _ in table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(cell(row.get(name), spec) for _, name, spec in table.columns) + " |" for row in rows]
    machine = document["machine"]
    source = f"{machine['device']}; `{machine['command']}`; rows in benchmarks/results/{table.file}"
    return "\n".join([*lines, "", f"({source})", ""])


def _is(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def written(name: str) -> str:
    """The table of that name."""
    return render(TABLES[name]) if name in TABLES else grid(name) if name in GRIDS else comparison(name)


def cell(value: object, spec: str) -> str:
    """One cell; a figure that a row does not have is a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else format(value, spec).replace("|", "\\|")  # a bar would end the cell


def main() -> int:
    """Write (or check) every table; the number of stale files and broken promises is the exit code."""
    from evidence import violations
    from reproduce import PAGE, is_fresh

    stale = [] if is_fresh("--check" in sys.argv) else [f"claims of {PAGE.name}"]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda found: found[1] + written(found[2]) + found[4], text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    broken = violations()
    for line in broken:
        print(f"a row breaks a promise: {line}")
    return len(stale) + len(broken) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
