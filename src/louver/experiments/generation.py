"""Generate from a file through Louver: what ``louver generate`` does, and the row it ends in."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from louver.attention import LouverAttention
from louver.errors import InputFileError
from louver.experiments.decoding import decode, prefill, stop_tokens
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.document import build_prompt, read_document, read_text
from louver.policies import DEFAULT_POLICY, parse

DEMO = "demo"  # this name stands for the offline model


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to generate. Every field changes results, but for ``backend``, which changes only speed, and where the cache is, which changes none."""

    model: str  # a folder, a name on the model hub, or "demo"
    prompt_file: Path
    question: str | None = None  # put under the file's text
    chat: bool = False  # go through the model's chat template
    policy: str = DEFAULT_POLICY
    index: str = "sketch"  # sketch, flat or ball; the last two serve retrieval policies
    max_new_tokens: int = 128
    backend: str = "auto"
    store: str = "device"  # where exact keys and values live: device, host or disk
    store_path: Path | None = None  # of the store disk: the folder of its working files


def run(
    config: Config,
    on_text: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    loaded: tuple[Any, Any] | None = None,
) -> list[dict[str, Any]]:
    """Generate greedily until the text ends; on_text receives it piece by piece. Returns one row.

    Raises:
        PolicyError, InputFileError, UnsupportedModelError: something in the config can't be used.
    """
    from louver.integrations.transformers import attach

    policy = parse(config.policy)
    refused_early = {"index": config.index, "store": config.store, "path": config.store_path}
    LouverAttention(policy, backend=config.backend, **refused_early)  # before the model takes its time
    read_text(config.prompt_file)  # before the model takes its time
    if config.max_new_tokens < 1:
        raise InputFileError(f"max_new_tokens={config.max_new_tokens}; wanted at least 1")
    on_progress("load the model", 0, 1)
    model, tokenizer = loaded or (demo_model() if config.model == DEMO else load_model(config.model))
    on_progress("load the model", 1, 1)
    prompt = build_prompt(tokenizer, read_document(config.prompt_file, tokenizer), config.question, config.chat)
    cache = attach(
        model,
        policy=policy,
        backend=config.backend,
        index=config.index,
        store=config.store,
        path=config.store_path,
    )
    num_prefill, done = prompt.num_tokens - 1, 0

    def advance(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        on_progress("read the prompt", done, num_prefill)

    started = time.perf_counter()
    if num_prefill:
        on_progress("read the prompt", 0, num_prefill)
        prefill(model, cache, prompt.ids[:, :-1], advance)
    prefill_s = time.perf_counter() - started
    stop = stop_tokens(model, tokenizer)
    stream = _Stream(tokenizer, on_text, stop)
    try:
        decoded = decode(model, cache, int(prompt.ids[0, -1]), config.max_new_tokens, stop=stop, on_token=stream)
    finally:
        model.set_attn_implementation("sdpa")
    summary, memory = cache.summary(), cache.memory()
    row = {
        "policy": policy.spec,
        "index": config.index,
        "kv_len": prompt.num_tokens + len(decoded.tokens) - 1,
        "device": model.device.type,
        "num_tokens": len(decoded.tokens),
        "text": stream.text,
        "prefill_s": prefill_s,
        "tokens_per_s": 1e3 * len(decoded.tokens) / sum(decoded.step_ms),
        "bytes_fraction": summary.bytes_fraction,
        "bytes_read": summary.bytes_read,
        "bytes_dense": summary.bytes_dense,
        "exact_fraction": summary.exact_fraction,
        "output_error_bound": summary.certificate_mean,
        "output_error_bound_worst": summary.certificate_worst,
        "dropped_mass_bound": summary.dropped_mass_bound_mean,
        "keys_values_bytes": memory["keys_values"],
        "index_bytes": memory["index"],
        "index_memory_fraction": memory["index_fraction"],
        "store": config.store,
        **{f"{place}_bytes": memory[place] for place in ("gpu", "host", "disk")},
        "guarantee": policy.guarantee,
    }
    return [row]


class _Stream:
    """Turns tokens into text as they come. A character that takes several tokens waits until it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: frozenset[int]) -> None:
        self.text = ""
        self._tokens: list[int] = []
        self._tokenizer, self._on_text, self._stop = tokenizer, on_text, stop

    def __call__(self, token: int) -> None:
        if token in self._stop:
            return
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):
            self._on_text(text[len(self.text) :])
            self.text = text
