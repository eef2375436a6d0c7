"""The agreement experiment: does a model that decodes through a policy say what it would have said?

Several long prompts, one dense prefill each; every policy then continues from a copy of that cache. All are led along the tokens that
dense attention chooses, so each step compares the same context: the KL divergence of its next-token distribution, and whether its most
probable token is the same. Where all are the same, greedy decoding gives the very same text. Beside them: the cache in FP8 and in
KIVI's 4 bits.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.attention import LouverAttention
from louver.attention.asked import num_asked_violations
from louver.errors import InputFileError
from louver.experiments.audit import Audit
from louver.experiments.baselines import Fp8, Kivi4
from louver.experiments.baselines.coded import CODES, CodedAttention
from louver.experiments.decoding import decode, kl_nats, prefill
from louver.experiments.demo import with_policy
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.document import Document, build_prompt, python_topics
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.journal import Journal
from louver.kv.device import DeviceStore
from louver.policies import parse
from louver.protocols import AttendResult, LayerAttention

POLICIES = (
    "exact:0.002", "exact:0.005", "exact:0.01", "exact:0.01+unread:0.05", "exact:0.03", "error:0.05", "mass:0.001", "error:0.1",
    "error:0.2", "error:0.5", "mass:0.01", "mass:0.05", "mass:0.1", "fp8", "kivi4",
)  # fmt: skip
MOST_TOKENS = 16  # that a LouverAttention serves at once, each as if it came alone
QUESTION = "What is this text about? Give the details that matter, with examples."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every field but backend and audit_stride changes results."""

    policies: tuple[str, ...] = option(POLICIES, help="Policies, and fp8, kivi4.")
    model: str | None = option(None, help="A folder or a name on the model hub; default: the offline model.")
    prompts: tuple[int, ...] = option((0, 1, 2, 3, 4), help="Which prompts: successive parts of Python's help topics.")
    prompt_tokens: int = option(3000, help="Tokens of each part.")
    steps: int = option(64, help="Tokens to decode.")
    audit_stride: int = option(8, help="Check every so many steps of every layer in float64.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """Rows, one per policy over all prompts; and rows per prompt. What ``journal`` holds is not measured again.

    Raises:
        PolicyError, InputFileError, UnsupportedModelError: something in the config can't be used.
    """
    for spec in config.policies:
        if spec not in CODES:
            parse(spec)
    if config.steps < 1 or config.prompt_tokens < 1 or config.audit_stride < 1:
        raise InputFileError("steps, prompt_tokens and audit_stride must be at least 1")
    model, tokenizer = loaded or (load_model(config.model) if config.model else demo_model())
    journal = journal or Journal()
    total = len(config.prompts) * len(config.policies)
    per_prompt: list[dict[str, Any]] = []
    try:
        for number in config.prompts:
            same = {"model": config.model, "prompt": number} | {
                name: getattr(config, name) for name in ("prompt_tokens", "steps", "audit_stride")
            }
            branches = None
            for spec in config.policies:
                row = journal.get(**same, agreement=spec)
                if row is None:
                    branches = branches or _Branches(config, model, tokenizer, number)
                    row = branches.row(spec)
                    journal.put(row, **same, agreement=spec)
                per_prompt.append(row)
                on_progress("Decoding, policy by policy", len(per_prompt), total)
    finally:
        model.set_attn_implementation("sdpa")  # as it came
    return joined(per_prompt), {"rows_per_prompt": per_prompt}


class _Branches:
    """One prompt, read once; every policy continues from a copy of the cache."""

    def __init__(self, config: Config, model: Any, tokenizer: Any, number: int) -> None:
        from louver.integrations.transformers import attach

        self._config, self._model, self._number = config, model, number
        document = _part(tokenizer, number, config.prompt_tokens)
        prompt = build_prompt(tokenizer, document, QUESTION, chat=bool(tokenizer.chat_template))
        self._last = int(prompt.ids[0, -1])
        self._cache = attach(model, policy="exact:0.01", backend=config.backend)
        prefill(model, self._cache, prompt.ids[:, :-1])
        self._dense = decode(model, with_policy(self._cache, "dense"), self._last, config.steps)
        self._num_tokens = prompt.num_tokens

    def row(self, spec: str) -> dict[str, Any]:
        """How one policy fares along the dense path."""
        branch = _coded(self._cache, CODES[spec]()) if spec in CODES else with_policy(self._cache, spec)
        checks = None
        if spec not in CODES:
            checks = _Checks(spec, self._config.audit_stride)
            branch.observer = checks
        at_once = 1 if spec in CODES or spec == "dense" else MOST_TOKENS
        logits = _led(self._model, branch, [self._last, *self._dense.tokens[:-1]], at_once)
        same = logits.argmax(-1) == torch.tensor(self._dense.tokens)
        kl, summary = kl_nats(self._dense.logits, logits), branch.summary()
        store = _store(self._cache.served_layers[0].attention)
        return {
            "data": Path(getattr(self._model.config, "name_or_path", "")).name,
            "prompt": self._number,
            "kv_len": self._num_tokens,
            "head_dim": store.keys.shape[3],
            "num_q_heads": self._model.config.get_text_config().num_attention_heads,
            "num_kv_heads": store.keys.shape[1],
            "num_layers": len(branch.layers),
            "policy": spec,
            "num_steps": len(same),
            "num_same_steps": int(same.sum()),
            "num_equal_tokens": int(same.long().cumprod(0).sum()),
            "kl_nats_steps": kl.tolist(),
            "kl_nats": kl.mean().item(),
            "bytes_read": summary.bytes_read,
            "bytes_dense": summary.bytes_dense,
            "num_checked": 0 if checks is None else checks.num_checked,
            "num_bound_violations": None if checks is None else checks.num_bound_violations,
            "num_asked_violations": None if checks is None else checks.num_asked_violations,
            "guarantee": "none" if spec in CODES else parse(spec).guarantee,
        }


class _Checks:
    """An observer: what was asked is checked at every step, the truth at every so many."""

    def __init__(self, spec: str, stride: int) -> None:
        self.policy = parse(spec)
        self.num_asked_violations = 0
        self._audit, self._stride, self._seen = Audit(drops=self.policy.drops), stride, {}

    def __call__(self, layer_idx: int, q: Tensor, result: AttendResult, layer: Any, softmax_scale: float) -> None:
        """See one step of one layer."""
        self.num_asked_violations += num_asked_violations(self.policy, result)
        seen = self._seen[layer_idx] = self._seen.get(layer_idx, -1) + 1
        if seen % self._stride == 0:
            self._audit(layer_idx, q, result, layer, softmax_scale)

    @property
    def num_checked(self) -> int:
        """Outputs compared with float64: layers x steps x heads."""
        return sum(step.output_error.numel() for step in self._audit.steps)

    @property
    def num_bound_violations(self) -> int:
        """Of those, how many were further off than certified, or dropped more."""
        found = sum(step.num_bound_violations for step in self._audit.steps)
        if self.policy.drops:
            found += sum(int((s.dropped_mass > s.dropped_mass_bound + 1e-12).sum()) for s in self._audit.steps)
        return found


def _led(model: Any, cache: Any, tokens: list[int], at_once: int) -> Tensor:
    """The logits [len(tokens), vocab] of a model that is fed these tokens after its cache, some at once where its layers serve that."""
    logits = []
    with torch.no_grad():
        for part in torch.tensor([tokens], device=model.device).split(at_once, dim=1):
            logits.append(model(input_ids=part, **cache.kwargs(), use_cache=True).logits[0].float().cpu())
    return torch.cat(logits)


def joined(per_prompt: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy over its prompts."""
    rows = []
    for spec in dict.fromkeys(row["policy"] for row in per_prompt):
        mine = [row for row in per_prompt if row["policy"] == spec]
        kl = torch.tensor([x for row in mine for x in row["kl_nats_steps"]], dtype=torch.float64)
        steps = sum(row["num_steps"] for row in mine)
        shared = {k: mine[0][k] for k in ("data", "head_dim", "num_q_heads", "num_kv_heads", "num_layers", "policy")}
        rows.append(
            shared
            | {
                "kv_len": max(row["kv_len"] for row in mine),
                "num_prompts": len(mine),
                "num_equal_prompts": sum(row["num_equal_tokens"] == row["num_steps"] for row in mine),
                "num_steps": steps,
                "top1_agreement": sum(row["num_same_steps"] for row in mine) / steps,
                "kl_nats": kl.mean().item(),
                "kl_nats_p99": kl.quantile(0.99).item(),
                "kl_nats_max": kl.max().item(),
                "bytes_fraction": sum(row["bytes_read"] for row in mine) / sum(row["bytes_dense"] for row in mine),
                "num_checked": sum(row["num_checked"] for row in mine),
                "num_bound_violations": _total(mine, "num_bound_violations"),
                "num_asked_violations": _total(mine, "num_asked_violations"),
                "guarantee": mine[0]["guarantee"],
            }
        )
    return rows


def _total(rows: Sequence[dict[str, Any]], name: str) -> int | None:
    return None if any(row[name] is None for row in rows) else sum(row[name] for row in rows)


def _part(tokenizer: Any, number: int, num_tokens: int) -> Document:
    """The number-th part of Python's help topics."""
    whole = python_topics(tokenizer, (number + 1) * num_tokens).text
    before = python_topics(tokenizer, number * num_tokens).text if number else ""
    text = whole[len(before) :]
    if not text.strip():
        raise InputFileError(f"prompt {number} of {num_tokens} tokens lies beyond the end of Python's help topics")
    return Document(text=text)


def _store(attention: LayerAttention) -> DeviceStore:
    assert isinstance(attention, LouverAttention), "the cache was made with a policy"
    return attention.store


def _coded(cache: Any, code: Fp8 | Kivi4) -> Any:
    """A copy of a LouverCache, tokens included, that holds keys and values in a code."""
    branch = copy.deepcopy(cache)
    for layer in branch.served_layers:
        attention = CodedAttention(code)
        attention.store = _store(layer.attention)
        layer.attention = attention
    return branch
