"""The long-generation experiment: do small errors add up over a thousand tokens?

The model goes on from a text with dense attention; that is the path. Each method then (a) is fed the tokens of the path, which shows how its
predictions drift from dense attention's as its own keys, values and hidden states pile up, and (b) goes on by itself, which shows where
its text parts from the path. After the first different token the two texts are about different things, so agreement after it
means little; teacher-forced KL does not have that flaw.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.branching import Prompt
from louver.experiments.compare import compare
from louver.experiments.decoding import kl_nats
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.journal import Journal
from louver.experiments.long_tasks import stretches
from louver.experiments.methods import Method, method
from louver.experiments.models import load, model_name

QUARTERS = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to go on from, how long, and with which methods. Every field but ``backend`` changes results."""

    model: str = option("demo", help="A folder, a name on the model hub, or demo for the offline model.")
    prompt_file: Path | None = option(None, help="A text file; without one, Python's own help topics.")
    kv_len: int = option(2048, help="Tokens of the prompt.")
    num_steps: int = option(1024, help="Tokens to decode.")
    num_samples: int = option(1, help="Prompts, stretches of the text.")
    policies: tuple[str, ...] = option(("exact:0.002", "exact:0.01", "budget:0.1"), help="As for quality.")
    by_itself: bool = option(True, help="Let every method go on by itself as well.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here (speed only).")
    seed: int = option(0, help="Unused: decoding is greedy.")

    def __post_init__(self) -> None:
        if min(self.kv_len, self.num_steps, self.num_samples) < 1 or self.num_steps < QUARTERS:
            raise InputFileError(f"kv_len and num_samples must be at least 1, num_steps at least {QUARTERS}")
        self.methods()

    def methods(self) -> list[Method]:
        """The methods beside dense."""
        return [method(spec, self.backend) for spec in dict.fromkeys(self.policies) if spec != "dense"]


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """A row per method; ``kl_nats_quarters`` and ``top1_agreement_quarters`` say how it went along the way.

    What ``journal`` holds is not measured again.

    Raises:
        InputFileError: the model or the text isn't there, or the text is too short.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    model, tokenizer = load(config.model, on_progress, loaded)
    prompts, _ = stretches(tokenizer, config.prompt_file, config.kv_len, 0, config.num_samples)
    head = {"data": model_name(model), "kv_len": config.kv_len + config.num_steps, "device": model.device.type}
    try:
        return [head | row for row in measure(config, model, prompts, on_progress, journal)], {}
    finally:
        model.set_attn_implementation("sdpa")


def measure(
    config: Config, model: Any, prompts: Tensor, on_progress: Progress = no_progress, journal: Journal | None = None
) -> Iterator[dict[str, Any]]:
    """A row per method after these prompts [samples, kv_len]."""
    journal, methods = journal or Journal(), config.methods()
    same = {
        name: getattr(config, name)
        for name in ("model", "prompt_file", "kv_len", "num_steps", "num_samples", "by_itself")
    }
    keys = {one.spec: {**same, "generation": one.spec} for one in methods}
    missing = [one for one in methods if journal.get(**keys[one.spec]) is None]
    if missing:
        for spec, row in _rows(config, Prompt.read(model, prompts), missing, on_progress):
            journal.put(row, **keys[spec])
    for key in keys.values():
        row = journal.get(**key)
        assert row is not None, "a run leaves a row per method"
        yield row


def _rows(
    config: Config, prompt: Prompt, methods: list[Method], on_progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    steps = config.num_steps

    def told(what: str) -> Any:
        return lambda done: on_progress(f"Decode, {what}", done, steps)

    path, _ = prompt.greedy(prompt.recorded, steps, told("dense"))
    # Dense, fed its own path the way the others are: the same kernels for the same numbers of tokens.
    full = prompt.forced(prompt.recorded, path).logits
    for one, decoded in compare(prompt, methods, lambda layers: prompt.forced(layers, path)):
        alone = {}
        if config.by_itself:
            tokens, _ = prompt.greedy(prompt.served_by(one.make), steps, told(one.spec))
            alone = _alone(tokens, path)
        kl = torch.stack([kl_nats(p, q) for p, q in zip(full, decoded.logits, strict=True)])
        agrees = decoded.logits.argmax(-1) == full.argmax(-1)
        yield (
            one.spec,
            {
                "policy": one.spec,
                "guarantee": one.guarantee,
                "bytes_fraction": decoded.bytes_fraction,
                "num_tokens": path.numel(),
                "kl_nats": kl.mean().item(),
                "kl_nats_p99": kl.flatten().double().quantile(0.99).item(),
                "kl_nats_quarters": [part.mean().item() for part in kl.tensor_split(QUARTERS, 1)],
                "top1_agreement": agrees.double().mean().item(),
                "top1_agreement_quarters": [part.double().mean().item() for part in agrees.tensor_split(QUARTERS, 1)],
                **alone,
            },
        )


def _alone(tokens: Tensor, path: Tensor) -> dict[str, Any]:
    """How long a text of its own stays on the path, mean over samples."""
    same = tokens == path
    first = same.double().cumprod(1).sum(1)  # tokens before the first different one
    return {
        "num_equal_tokens": first.mean().item(),
        "equal_tokens_fraction": same.double().mean().item(),
        "all_equal_fraction": same.all(1).double().mean().item(),
    }
