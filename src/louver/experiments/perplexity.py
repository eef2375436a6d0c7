"""The perplexity experiment: a long text continued token by token, every method after the same reading of it.

Stretches of text are read with dense attention; the tokens that follow are then fed one by one, and each method's probabilities of them
compared with dense attention's, token for token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.branching import Prompt
from louver.experiments.compare import forced
from louver.experiments.decoding import kl_nats
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.intervals import bootstrap
from louver.experiments.journal import Journal
from louver.experiments.long_tasks import stretches
from louver.experiments.methods import Method, method
from louver.experiments.models import load, model_name
from louver.experiments.quality import METHODS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which text, and which methods. Every field but ``batch`` and ``backend`` changes results."""

    model: str = option("demo", help="A folder, a name on the model hub, or demo for the offline model.")
    prompt_file: Path | None = option(None, help="A text file; without one, Python's own help topics.")
    kv_len: int = option(8128, help="Tokens read before the first one that is judged.")
    num_steps: int = option(64, help="Tokens judged per stretch of text.")
    num_samples: int = option(32, help="Stretches of text.")
    policies: tuple[str, ...] = option(tuple(METHODS.split(",")), help="As for quality.")
    batch: int = option(4, help="Stretches read together (speed and memory only).")
    backend: str = option("auto", help="Which kernels; auto is the fastest here (speed only).")
    seed: int = option(0, help="Of the bootstrap.")

    def __post_init__(self) -> None:
        if min(self.kv_len, self.num_steps, self.num_samples, self.batch) < 1:
            raise InputFileError("kv_len, num_steps, num_samples and batch must be at least 1")
        self.methods()

    def methods(self) -> list[Method]:
        """The methods, dense among them."""
        return [method(spec, self.backend) for spec in dict.fromkeys(("dense", *self.policies))]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Per judged token [stretches, steps], in nats and float64."""

    surprise: Tensor  # -log p of the token that follows
    kl: Tensor  # KL(dense || this one)
    agrees: Tensor  # bool: both find the same token most probable

    @classmethod
    def of(cls, logits: Tensor, full: Tensor, expected: Tensor) -> "Tokens":
        surprise = -logits.log_softmax(-1).gather(-1, expected.to(logits.device)[..., None])[..., 0]
        kl = torch.stack([kl_nats(p, q) for p, q in zip(full, logits, strict=True)])
        return cls(surprise=surprise.double().cpu(), kl=kl.cpu(), agrees=(logits.argmax(-1) == full.argmax(-1)).cpu())

    def plain(self) -> dict[str, list[Any]]:
        """As JSON can hold it."""
        return {name: x.tolist() for name, x in vars(self).items()}

    @classmethod
    def joined(cls, parts: list[dict[str, list[Any]]]) -> "Tokens":
        """Several ``plain`` ones as one."""
        return cls(**{name: torch.cat([torch.tensor(part[name]).double() for part in parts]) for name in parts[0]})

    def row(self, dense: "Tokens", seed: int) -> dict[str, Any]:
        """Fields of a result row. Intervals are over stretches of text, whose tokens are not independent of each other."""
        added = bootstrap((self.surprise - dense.surprise).mean(1), seed)
        return {
            "num_tokens": self.surprise.numel(),
            "perplexity": math.exp(self.surprise.mean().item()),
            "perplexity_change": math.expm1(added.mean),
            "perplexity_change_low": math.expm1(added.low),
            "perplexity_change_high": math.expm1(added.high),
            **bootstrap(self.kl.mean(1), seed).fields("kl_nats"),
            "kl_nats_p99": self.kl.flatten().quantile(0.99).item(),
            "top1_agreement": self.agrees.double().mean().item(),
        }


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """A row per method. What ``journal`` holds is not measured again.

    Raises:
        InputFileError: the model or the text isn't there, or the text is too short.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    model, tokenizer = load(config.model, on_progress, loaded)
    prompts, following = stretches(tokenizer, config.prompt_file, config.kv_len, config.num_steps, config.num_samples)
    head = {"data": model_name(model), "device": model.device.type, "kv_len": config.kv_len + config.num_steps}
    head["text"] = config.prompt_file.name if config.prompt_file else "Python's help topics"
    try:
        return [head | row for row in measure(config, model, prompts, following, on_progress, journal)], {}
    finally:
        model.set_attn_implementation("sdpa")


def measure(
    config: Config,
    model: Any,
    prompts: Tensor,
    following: Tensor,
    on_progress: Progress = no_progress,
    journal: Journal | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per method, for what follows the prompts."""
    journal, methods, found = journal or Journal(), config.methods(), {}
    same = {name: getattr(config, name) for name in ("model", "prompt_file", "kv_len", "num_steps", "num_samples")}
    starts = range(0, len(prompts), config.batch)
    for number, start in enumerate(starts):
        part = slice(start, min(start + config.batch, len(prompts)))
        keys = {one.spec: {**same, "samples": [part.start, part.stop], "text": one.spec} for one in methods}
        missing = [one for one in methods if journal.get(**keys[one.spec]) is None]
        if missing:
            prompt, expected = Prompt.read(model, prompts[part]), following[part]
            full = prompt.forced(prompt.recorded, expected).logits
            for done, (one, decoded) in enumerate(forced(prompt, missing, expected)):
                tokens = Tokens.of(decoded.logits, full, expected)
                journal.put([tokens.plain(), decoded.bytes_fraction, len(expected)], **keys[one.spec])
                on_progress("Continue the text", number * len(methods) + done + 1, len(starts) * len(methods))
        for spec, key in keys.items():
            found.setdefault(spec, []).append(journal.get(**key))
    joined = {spec: Tokens.joined([tokens for tokens, *_ in parts]) for spec, parts in found.items()}
    for one in methods:
        share = sum(x * n for _, x, n in found[one.spec]) / len(prompts)
        fields = {"policy": one.spec, "guarantee": one.guarantee, "bytes_fraction": share}
        yield fields | joined[one.spec].row(joined["dense"], config.seed)
