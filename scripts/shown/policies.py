"""What policies read, promise and err."""

from shown.table import Table

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
    "agreement": Table(file="agreement.json", columns=_AGREEMENT),
    "agreement-gpu": Table(file="agreement_gpu.json", columns=_AGREEMENT),
}
