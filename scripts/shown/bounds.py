"""What bounds leave to read."""

from shown.table import Table

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

TABLES = {
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
    "nested": Table(
        file="pruning_nested.json",
        columns=(
            ("code", "codec", ""),
            ("planes", "planes", ""),
            ("keys wanted", "target_fraction", ".2%"),
            ("scanned", "scanned_fraction", ".1%"),
            ("bytes read", "bytes_fraction", ".3f"),
            ("keys lost", "num_false_negatives", ""),
        ),
        where={"codec": ("frames", "frames-2+2", "frames-3+1")},
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
