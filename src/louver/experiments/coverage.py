"""The coverage experiment: over a long greedy generation, how many keys hold 50, 90 and 99% of the attention at each step.

The model decodes through Louver; an observer looks at every layer of every step, scores all keys and sorts the weights. Beside the
counts it keeps a recording: for some layers, the tokens that carried the most weight at each step (the mean over heads), and how
many keys were exact, sketched or unread, for the report's slider.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.decoding import decode, prefill, stop_tokens
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.document import build_prompt, python_topics, read_document
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.policies import parse
from louver.protocols import AttendResult
from louver.shapes import group_heads

QUESTION = "Explain in detail, step by step and with examples, what this document says."
SHOWN_TOKENS = 40  # of the recording, per layer and step
CONTEXT_TOKENS = 12  # of text on both sides of the widest and the narrowest step


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to generate and what to keep. Every field changes results but ``backend``."""

    model: str | None = option(None, help="A folder or hub name. Default: a 135M model, offline.")
    prompt_file: Path | None = option(None, help="A text file to go on from. Default: Python's own help topics.")
    question: str = option(QUESTION, help="Asked about the text, through the model's chat template if it has one.")
    tokens: int = option(4096, help="Cut the text to this many tokens.")
    max_new_tokens: int = option(256, help="Decode at most this many tokens.")
    shares: tuple[float, ...] = option((0.5, 0.9, 0.99), help="Of the attention's mass.")
    policy: str = option("exact:0.01", help="What a decode step keeps.")
    recorded_layers: int = option(6, help="Layers of the recording, evenly spread.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")

    def __post_init__(self) -> None:
        parse(self.policy)
        if bad := [s for s in self.shares if not 0 < s < 1]:
            raise InputFileError(f"share {bad[0]}; wanted a share of the mass between 0 and 1")
        if self.max_new_tokens < 1 or self.tokens < 1:
            raise InputFileError("wanted at least one token to read and one to decode")


@dataclass
class Watcher:
    """A cache's observer: sorts every layer's weights, step by step."""

    shares: tuple[float, ...]
    recorded: frozenset[int]  # layers
    needed: list[dict[int, Tensor]] = field(default_factory=list)  # per step: layer -> int64 [num_q_heads, shares]
    frames: list[dict[int, dict[str, Any]]] = field(default_factory=list)  # per step: layer -> what the slider shows
    bytes_fraction: list[list[float]] = field(default_factory=list)

    def __call__(self, layer_idx: int, q: Tensor, result: AttendResult, layer: Any, softmax_scale: float) -> None:
        """Look at one layer of one step; a layer seen again begins a new step."""
        if not self.needed or layer_idx in self.needed[-1]:
            for table in (self.needed, self.frames):
                table.append({})
            self.bytes_fraction.append([])
        weights = all_weights(q, layer.store.keys, softmax_scale)
        self.needed[-1][layer_idx] = keys_needed(weights, self.shares)
        self.bytes_fraction[-1].append(result.stats.bytes_fraction)
        if layer_idx in self.recorded:
            best = weights.mean(0).topk(min(SHOWN_TOKENS, weights.shape[1]))
            stats = result.stats
            self.frames[-1][layer_idx] = {
                "tokens": " ".join(
                    str(i) for i in best.indices.tolist()
                ),  # lists would take a line a number in the file
                "weights": " ".join(f"{w:.4g}" for w in best.values.tolist()),
                "exact": round(stats.fraction("exact"), 4),
                "sketched": round(stats.fraction("coarse"), 4),
                "unread": round(stats.fraction("unread"), 4),
                "bytes": round(stats.bytes_fraction, 4),
            }


def all_weights(q: Tensor, keys: Tensor, softmax_scale: float) -> Tensor:
    """Attention weights [num_q_heads, kv_len] of one row's query over all its keys, float32."""
    logits = group_heads(q.float(), keys.shape[1]) @ keys.float().mT
    return (logits.flatten(1, 2)[0] * softmax_scale).softmax(-1)


def keys_needed(weights: Tensor, shares: tuple[float, ...]) -> Tensor:
    """How many of the largest weights of each line [.., kv_len] hold each share: int64 [.., shares]."""
    mass = weights.double().sort(dim=-1, descending=True).values.cumsum(-1)
    return torch.stack([((mass < share).sum(-1) + 1).clamp(max=weights.shape[-1]) for share in shares], -1)


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """A row per share; ``rows_per_step`` and the ``recording``. ``loaded`` is a (model, tokenizer) that is already there.

    Raises:
        InputFileError, PolicyError, UnsupportedModelError: something in the config can't be used.
    """
    from louver.integrations.transformers import attach

    model, tokenizer = loaded or (demo_model(say) if config.model is None else load_model(config.model))
    document = (
        python_topics(tokenizer, config.tokens)
        if config.prompt_file is None
        else read_document(config.prompt_file, tokenizer, config.tokens)
    )
    prompt = build_prompt(tokenizer, document, config.question, chat=bool(tokenizer.chat_template))
    cache = attach(model, policy=config.policy, backend=config.backend)
    served = [layer.layer_idx for layer in cache.served_layers]
    spread = torch.linspace(0, len(served) - 1, min(config.recorded_layers, len(served))).round().long().tolist()
    watcher = Watcher(config.shares, frozenset(served[i] for i in spread))
    try:
        prefill(model, cache, prompt.ids[:, :-1], _counted(on_progress, "Reading the text", prompt.num_tokens - 1))
        cache.observer = watcher
        count = _counted(on_progress, "Decoding", config.max_new_tokens)
        first, stop = int(prompt.ids[0, -1]), stop_tokens(model, tokenizer)
        decoded = decode(model, cache, first, config.max_new_tokens, stop=stop, on_token=lambda token: count(1))
    finally:
        model.set_attn_implementation("sdpa")
    # The last token was decoded and never fed.
    texts = [tokenizer.decode([token]) for token in [*prompt.ids[0].tolist(), *decoded.tokens[:-1]]]
    per_step = _step_rows(watcher, config, prompt.num_tokens, [tokenizer.decode([token]) for token in decoded.tokens])
    head = _facts(config, model, cache, prompt.num_tokens)
    recording = {"texts": texts, "first_step": prompt.num_tokens - 1, "policy": config.policy, "steps": watcher.frames}
    rows = [head | _share_row(watcher, per_step, place, share) for place, share in enumerate(config.shares)]
    return rows, {"rows_per_step": per_step, "recording": recording}


def _counted(on_progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    on_progress(stage, 0, total)
    return advance


def _step_rows(watcher: Watcher, config: Config, num_prompt: int, words: list[str]) -> list[dict[str, Any]]:
    rows = []
    for step, needed in enumerate(watcher.needed):
        counts = torch.cat(list(needed.values())).double()  # [layers * heads, shares]
        shares = watcher.bytes_fraction[step]
        row: dict[str, Any] = {"step": step, "kv_len": num_prompt + step, "text": words[step]}
        for place, share in enumerate(config.shares):
            row[f"keys_for_{100 * share:g}"] = float(counts[:, place].mean())
            row[f"keys_for_{100 * share:g}_max"] = float(counts[:, place].max())
        rows.append(row | {"bytes_fraction": sum(shares) / len(shares)})
    return rows


def _share_row(watcher: Watcher, per_step: list[dict[str, Any]], place: int, share: float) -> dict[str, Any]:
    name = f"keys_for_{100 * share:g}"
    counts = torch.cat([one[:, place] for step in watcher.needed for one in step.values()]).double()
    widest, narrowest = (f(per_step, key=lambda row: row[name]) for f in (max, min))
    return {
        "share": share,
        "num_steps": len(per_step),
        "keys": float(counts.mean()),
        "keys_fraction": sum(row[name] / row["kv_len"] for row in per_step) / len(per_step),
        **{f"keys_p{p}": float(counts.quantile(p / 100)) for p in (20, 50, 80)},
        "keys_max": float(counts.max()),
        "widest_step": widest["step"],
        "widest_keys": widest[name],
        "widest_text": _around(per_step, widest["step"]),
        "narrowest_step": narrowest["step"],
        "narrowest_keys": narrowest[name],
        "narrowest_text": _around(per_step, narrowest["step"]),
        "guarantee": "exact",  # counted over every key
    }


def _around(per_step: list[dict[str, Any]], step: int) -> str:
    """The decoded text around a step, the step's own token in brackets."""
    first = max(0, step - CONTEXT_TOKENS)
    words = [row["text"] for row in per_step[first : step + CONTEXT_TOKENS + 1]]
    words[step - first] = f"[{words[step - first]}]"
    return " ".join("".join(words).split())


def _facts(config: Config, model: Any, cache: Any, num_prompt: int) -> dict[str, Any]:
    keys = cache.served_layers[0].attention.store.keys
    return {
        "data": config.model or "SmolLM2-135M-Instruct",
        "kv_len": num_prompt,
        "head_dim": keys.shape[3],
        "num_q_heads": model.config.get_text_config().num_attention_heads,
        "num_kv_heads": keys.shape[1],
        "num_layers": len(cache.served_layers),
        "policy": config.policy,
        "backend": config.backend,
        "device": keys.device.type,
    }
