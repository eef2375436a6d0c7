"""What models still answer."""

from shown.table import Table

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

_TEXT = (
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
)

TABLES = {
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
    "perplexity-methods": Table(file="perplexity.json", columns=_TEXT),
    "perplexity-256": Table(file="perplexity_256.json", columns=_TEXT),
    "perplexity-cpu": Table(file="perplexity_cpu.json", columns=_TEXT),
    "denoising": Table(
        file="denoising.json",
        columns=(
            ("task", "task", ""),
            ("kept", "kept_fraction", ".1%"),
            ("right", "accuracy", ".1%"),
            ("against dense", "accuracy_gain", "+.1%"),
            ("from", "accuracy_gain_low", "+.1%"),
            ("to", "accuracy_gain_high", "+.1%"),
            ("perplexity", "perplexity_change", "+.2%"),
            ("KL, nats", "kl_nats", ".1e"),
        ),
        where={"task": ("all", "documents", "text")},
    ),
    "long-generation": Table(
        file="long_generation.json",
        columns=(
            ("method", "policy", ""),
            ("bytes read", "bytes_fraction", ".3f"),
            ("tokens", "num_tokens", ",d"),
            ("KL, nats", "kl_nats", ".1e"),
            ("KL by quarters of the text", "kl_nats_quarters", ".1e"),
            ("same token", "top1_agreement", ".2%"),
            ("tokens equal, on its own", "num_equal_tokens", ",.0f"),
            ("guarantee", "guarantee", ""),
        ),
    ),
}
