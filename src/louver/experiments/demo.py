"""The demo: one long document, one question, two answers (dense attention and Louver), and everything checked by brute force.

One prefill serves every decode, each on its own copy of the cache: dense, then Louver while an Audit repeats each step of each
layer in float64 (its time is not counted). Where the texts part, Louver decodes once more along the dense tokens, so that the
logits of every step can be compared. Then both, and dense attention as transformers ships it, decode the same tokens in turn, to be
timed. The ball index is shown beside the flat one, which reads every key: under one policy both
must find the same keys, so what differs from dense is the policy's doing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.attention import LouverAttention
from louver.errors import InputFileError, UnsupportedModelError
from louver.experiments.audit import Audit
from louver.experiments.decoding import Decoded, decode, prefill, stop_tokens
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.demo_rows import Served, layer_rows, louver_row, reference_row, step_rows
from louver.experiments.document import (
    QUESTION,
    Document,
    Prompt,
    build_prompt,
    python_topics,
    read_document,
    read_text,
)
from louver.experiments.picture import picture
from louver.index import FlatIndex
from louver.policies import DEFAULT_POLICY, parse

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run. Every field changes results, but for ``backend``, which changes only speed."""

    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    document: Path | None = None  # a text file; None: Python's own help topics
    question: str = QUESTION
    policy: str = DEFAULT_POLICY
    index: str = "sketch"  # sketch, flat or ball; the last two serve retrieval policies
    document_tokens: int = 6000  # the document is cut here
    max_new_tokens: int = 32  # decoding goes on past an end of text, so that every run measures as many steps
    backend: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found, ready to be written: rows, rows per layer and per step, both texts, and data for the picture."""

    rows: list[dict[str, Any]]
    rows_per_layer: list[dict[str, Any]]
    rows_per_step: list[dict[str, Any]]
    texts: dict[str, str]
    picture: dict[str, Any]


def run(
    config: Config,
    on_progress: Progress = lambda stage, done, total: None,
    loaded: tuple[Any, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Demo:
    """Run the demo. ``loaded`` is a (model, tokenizer) that is already there; say as in demo_model.

    Raises:
        PolicyError, InputFileError, UnsupportedModelError: something in the config can't be used.
    """
    policy = parse(config.policy)
    _check(config)
    LouverAttention(policy, index=config.index, backend=config.backend)  # refused before the model takes its time
    on_progress("load the model", 0, 1)
    model, tokenizer = loaded or (load_model(config.model) if config.model else demo_model(say))
    on_progress("load the model", 1, 1)
    prompt = _prompt(config, model, tokenizer)
    cache = _attach(model, config)
    try:
        _prefill(model, cache, prompt, on_progress)
        dense = _decode(model, with_policy(cache, "dense"), prompt, config, "decode densely", on_progress)
        truth = None
        if config.index == "ball":
            truth = _served(
                model, with_flat_index(cache), prompt, config, "decode without an index", on_progress, dense
            )
        timed = copy.deepcopy(cache)
        found = _served(model, cache, prompt, config, "decode through Louver", on_progress, dense)
        times = _timed(model, timed, prompt, dense, on_progress)
    finally:
        model.set_attn_implementation("sdpa")  # as it came
    facts = _facts(model, found, config.index)
    rows = [reference_row(facts, name, times[name]) for name in ("dense", "sdpa")]
    if truth is not None:
        rows.append(louver_row(_facts(model, truth, "flat"), policy, dense, truth, {"dense": times["dense"]}))
    rows.append(louver_row(facts, policy, dense, found, times, truth))
    texts = {name: _text(model, tokenizer, run.tokens) for name, run in (("dense", dense), ("louver", found.free))}
    return Demo(
        rows=rows,
        rows_per_layer=layer_rows(policy, found.audit),
        rows_per_step=step_rows(tokenizer, dense, found),
        texts={"question": config.question, **texts},
        picture=picture(
            tokenizer, found.audit, prompt, num_steps=len(dense.tokens), num_q_heads=rows[0]["num_q_heads"]
        ),
    )


def _served(
    model: Any, cache: Any, prompt: Prompt, config: Config, stage: str, on_progress: Progress, dense: Decoded
) -> Served:
    """Decode on a copy of the cache under an audit; then, where the tokens differ, on the cache along the dense ones."""
    branch, audit = copy.deepcopy(cache), Audit(drops=cache.policy.drops)
    free = along = _decode(model, branch, prompt, config, stage, on_progress, audit)
    if free.tokens != dense.tokens:
        along = _decode(model, cache, prompt, config, "compare along dense", on_progress, None, dense.tokens)
    return Served(cache=branch, audit=audit, free=free, along=along)


def _timed(model: Any, cache: Any, prompt: Prompt, dense: Decoded, on_progress: Progress) -> dict[str, list[float]]:
    """Milliseconds per step of ``louver``, ``dense`` and ``sdpa``, from a cache that holds the prompt."""
    from louver.experiments.demo_timing import as_shipped, in_turn

    done = 0

    def advance(token: int) -> None:
        nonlocal done
        done += 1
        on_progress("take the time", done, len(dense.tokens))

    on_progress("take the time", 0, len(dense.tokens))
    caches = {"dense": with_policy(cache, "dense"), "sdpa": as_shipped(model, cache), "louver": cache}
    return in_turn(model, caches, int(prompt.ids[0, -1]), dense.tokens, advance)


def with_flat_index(cache: Any) -> Any:
    """A copy of a LouverCache, tokens included, whose searches read every key."""
    branch = copy.deepcopy(cache)
    for layer in branch.served_layers:
        layer.attention.index = FlatIndex(layer.attention.store)
    return branch


def with_policy(cache: Any, spec: str) -> Any:
    """A copy of a LouverCache, tokens included, that decodes by another policy."""
    branch = copy.deepcopy(cache)
    branch.policy = parse(spec)
    for layer in branch.served_layers:
        layer.attention.policy = branch.policy
    return branch


def _check(config: Config) -> None:
    for name in ("document_tokens", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise InputFileError(f"{name}={getattr(config, name)}; wanted at least 1")
    if config.document is not None:
        read_text(config.document)  # before the model takes its time


def _prompt(config: Config, model: Any, tokenizer: Any) -> Prompt:
    document: Document
    if config.document is None:
        document = python_topics(tokenizer, config.document_tokens)
    else:
        document = read_document(config.document, tokenizer, config.document_tokens)
    prompt = build_prompt(tokenizer, document, config.question, chat=bool(tokenizer.chat_template))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt.num_tokens + config.max_new_tokens > longest:
        raise InputFileError(
            f"the prompt has {prompt.num_tokens} tokens and {config.max_new_tokens} are to follow, but the model was made "
            f"for {longest}; take fewer document tokens"
        )
    return prompt


def _attach(model: Any, config: Config) -> Any:
    from louver.integrations.transformers import attach

    cache = attach(model, policy=config.policy, backend=config.backend, index=config.index)
    if not cache.served_layers:
        raise UnsupportedModelError(
            "no layer of this model has full attention, so there is nothing for Louver to serve"
        )
    return cache


def _prefill(model: Any, cache: Any, prompt: Prompt, on_progress: Progress) -> None:
    done, total = 0, prompt.num_tokens - 1

    def advance(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        on_progress("read the document", done, total)

    on_progress("read the document", 0, total)
    prefill(model, cache, prompt.ids[:, :-1], advance)


def _decode(
    model: Any,
    cache: Any,
    prompt: Prompt,
    config: Config,
    stage: str,
    on_progress: Progress,
    observer: Audit | None = None,
    forced: list[int] | None = None,
) -> Decoded:
    done = 0

    def advance(token: int) -> None:
        nonlocal done
        done += 1
        on_progress(stage, done, config.max_new_tokens)

    on_progress(stage, 0, config.max_new_tokens)
    cache.observer = observer
    last = int(prompt.ids[0, -1])
    return decode(
        model,
        cache,
        last,
        config.max_new_tokens,
        forced=forced,
        on_token=advance,
        watched_ms=(lambda: observer.elapsed_ms) if observer else (lambda: 0.0),
    )


def _facts(model: Any, served: Served, index: str) -> dict[str, Any]:
    """What every row says about the model and the cache."""
    cache = served.cache
    text, attention = model.config.get_text_config(), cache.served_layers[0].attention
    keys: Tensor = attention.store.keys
    return {
        "kv_len": keys.shape[2],
        "head_dim": keys.shape[3],
        "num_q_heads": text.num_attention_heads,
        "num_kv_heads": keys.shape[1],
        "num_layers": len(cache.layers),
        "num_layers_served": len(cache.served_layers),
        "dtype": str(keys.dtype).removeprefix("torch."),
        "device": keys.device.type,
        "index": index,
        "backend": attention.index.backend,
        "num_threads": torch.get_num_threads(),
    }


def _text(model: Any, tokenizer: Any, tokens: list[int]) -> str:
    """The tokens up to the end of the text, decoded."""
    stop = stop_tokens(model, tokenizer)
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokenizer.decode(tokens[:end]).strip()
