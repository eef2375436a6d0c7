"""``louver tune``: the policy per layer that meets a target on the model's own next-token distributions at the least bytes.

A text is read densely once, up to its last tokens; those are held out, and every choice of policies is judged by leading the model
along them from a copy of that cache. Two measures: the mean KL divergence from dense attention in nats, or the share of held-out
positions whose most probable token differs.

    1. up a ladder of policies, all layers alike, until the target is met at rung r
    2. every layer in turn alone at rung r - 1: what it costs the distribution, and what it saves
    3. bisect how many layers, the least costly per byte first, can stay at r - 1 with the target still met

The result was measured, on that text, with exactly those policies. It is a choice and promises nothing of other texts; what the policies
themselves certify holds as ever. Cost: a few passes over the held-out tokens per layer.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError, PolicyError
from louver.experiments.agreement import MOST_TOKENS
from louver.experiments.decoding import kl_nats, prefill
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.document import python_topics, read_text
from louver.experiments.experiment import Progress, no_progress
from louver.policies import Dense, parse
from louver.protocols import Policy

LADDER = ("exact:0.002", "exact:0.005", "exact:0.01", "exact:0.03", "exact:0.1", "exact:0.3", "exact:1")
MEASURES = ("kl", "top1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to tune, and how far it may be off. Every field but backend changes results."""

    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    prompt_file: Path | None = None  # a text file; None: Python's own help topics
    target_error: float = 1e-3  # of the measure, on the held-out tokens
    measure: str = "kl"
    ladder: tuple[str, ...] = LADDER  # cheapest first
    max_tokens: int = 4096  # the text is cut here
    held_out: int = 128  # tokens at its end
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputFileError(f"measure={self.measure!r} is unknown; wanted one of {', '.join(MEASURES)}")
        if not self.target_error > 0:
            raise InputFileError(f"target_error={self.target_error} can't be met; wanted above 0")
        if not 0 < self.held_out < self.max_tokens:
            raise InputFileError(f"held_out={self.held_out} must leave some of max_tokens={self.max_tokens} to read")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found: policies by layer index beside "default", and a row for every choice that was measured."""

    policies: dict[str, str]
    rows: list[dict[str, Any]]
    num_layers: int


def run(config: Config, on_progress: Progress = no_progress, loaded: tuple[Any, Any] | None = None) -> Tuning:
    """Find the policies.

    Raises:
        PolicyError: a rung can't be read, or no rung meets the target.
        InputFileError, UnsupportedModelError: something in the config can't be used.
    """
    rungs = [parse(spec) for spec in config.ladder]
    model, tokenizer = loaded or (load_model(config.model) if config.model else demo_model())
    try:
        judge = _Judge(config, model, tokenizer, on_progress)
        return _search(config, rungs, judge, on_progress)
    finally:
        model.set_attn_implementation("sdpa")  # as it came


def _search(config: Config, rungs: list[Policy], judge: "_Judge", on_progress: Progress) -> Tuning:
    layers, reached = judge.layers, None
    for rung, policy in enumerate(rungs):
        on_progress("All layers alike", rung + 1, len(rungs))
        if judge(dict.fromkeys(layers, policy), "all layers alike")[0] <= config.target_error:
            reached = rung
            break
    if reached is None:
        raise PolicyError(
            f"no policy of {', '.join(config.ladder)} meets {config.measure} <= {config.target_error:g}; "
            "give a larger target, or a ladder that ends in 'exact:1'"
        )
    dear = rungs[reached]
    chosen: dict[int, Policy] = dict.fromkeys(layers, dear)
    if reached:
        cheap, costs = rungs[reached - 1], {}
        best, best_bytes = judge(chosen, "all layers alike")
        for done, layer in enumerate(layers):
            error, read = judge(chosen | {layer: cheap}, f"layer {layer} alone cheaper")
            costs[layer] = max(0.0, error - best) / max(1e-9, best_bytes - read)
            on_progress("Layer by layer", done + 1, len(layers))
        order = sorted(layers, key=lambda layer: costs[layer])
        fits, fails = 0, len(layers)  # all of them cheaper missed the target
        while fails - fits > 1:
            middle = (fits + fails) // 2
            trial = chosen | dict.fromkeys(order[:middle], cheap)
            if judge(trial, f"{middle} layers cheaper")[0] <= config.target_error:
                fits = middle
            else:
                fails = middle
            on_progress("How many layers", len(layers) - (fails - fits), len(layers) - 1)
        chosen |= dict.fromkeys(order[:fits], cheap)
    judge(chosen, "chosen")
    policies = {"default": dear.spec}
    policies |= {str(layer): policy.spec for layer, policy in sorted(chosen.items()) if policy != dear}
    return Tuning(policies=policies, rows=judge.rows, num_layers=judge.num_layers)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """e to the mean surprise, in nats, of each token of ids [n] after those before it; logits [n, vocab] are those after each."""
    if len(ids) < 2:
        return float("nan")
    surprise = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:].to(logits.device))
    return surprise.exp().item()


class _Judge:
    """Measures a choice of policies on the held-out tokens; keeps a row for each."""

    def __init__(self, config: Config, model: Any, tokenizer: Any, on_progress: Progress) -> None:
        from louver.integrations.transformers import attach

        text = (
            python_topics(tokenizer, config.max_tokens).text
            if config.prompt_file is None
            else read_text(Path(config.prompt_file))
        )
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : config.max_tokens]
        if ids.shape[1] <= config.held_out:
            raise InputFileError(f"the text has {ids.shape[1]} tokens; wanted more than the {config.held_out} held out")
        self.rows: list[dict[str, Any]] = []
        self._config, self._model = config, model
        self._held_out = ids[:, -config.held_out :]
        self._cache = attach(model, policy="exact:0.01", backend=config.backend)  # whose sketch serves every policy
        self.num_layers = len(self._cache.layers)
        done = 0

        def advance(num_tokens: int) -> None:
            nonlocal done
            done += num_tokens
            on_progress("Reading the text", done, ids.shape[1] - config.held_out)

        prefill(model, self._cache, ids[:, : -config.held_out], advance)
        self.layers = [layer.layer_idx for layer in self._cache.served_layers]
        self._dense = self._lead(dict.fromkeys(self.layers, Dense()))[0]

    def __call__(self, policies: dict[int, Policy], stage: str) -> tuple[float, float]:
        """Error by the config's measure, and bytes over dense bytes."""
        logits, summary = self._lead(policies)
        kl = kl_nats(self._dense, logits)
        differs = (logits.argmax(-1) != self._dense.argmax(-1)).double().mean().item()
        specs = [policy.spec for policy in policies.values()]
        self.rows.append(
            {
                "stage": stage,
                "policy": " ".join(f"{specs.count(spec)}x{spec}" for spec in dict.fromkeys(specs)),
                "kl_nats": kl.mean().item(),
                "kl_nats_p99": kl.quantile(0.99).item(),
                "top1_agreement": 1 - differs,
                "perplexity": perplexity(logits, self._held_out[0]),
                "perplexity_dense": perplexity(self._dense, self._held_out[0]),
                "bytes_fraction": summary.bytes_fraction,
                "num_steps": len(kl),
            }
        )
        return (kl.mean().item() if self._config.measure == "kl" else differs), summary.bytes_fraction

    def _lead(self, policies: dict[int, Policy]) -> tuple[Tensor, Any]:
        branch, logits = copy.deepcopy(self._cache), []
        for layer in branch.served_layers:
            layer.attention.policy = policies[layer.layer_idx]  # pyright: ignore[reportAttributeAccessIssue] - made by attach
        with torch.no_grad():
            for part in self._held_out.to(self._model.device).split(MOST_TOKENS, dim=1):
                logits.append(self._model(input_ids=part, **branch.kwargs(), use_cache=True).logits[0].float().cpu())
        return torch.cat(logits), branch.summary()
