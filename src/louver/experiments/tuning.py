"""``louver tune``: policies that meet a target on the model's own next-token distributions at the least bytes, head by head.

A text is read densely once, up to its last tokens; those are held out, and every choice of policies is judged by leading the model
along them from a copy of that cache. Two measures: the mean KL divergence from dense attention in nats, or the share of held-out
positions whose most probable token differs.

    1. queries of the text before them show every head's error against bytes, policy by policy (experiments/fitting.py)
    2. the cheapest policy that meets the target for all layers alike
    3. the highest price of a byte at which every head's own choice meets it; both by bisection
    4. the cheaper of the two

The result was measured, on that text, with exactly those policies. It is a choice and promises nothing of other texts; what the policies
themselves certify holds as ever. Cost: every policy attends a few queries of every layer, and about ten passes over the held-out tokens.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError, PolicyError
from louver.experiments import capture as captures
from louver.experiments.agreement import MOST_TOKENS
from louver.experiments.decoding import kl_nats, prefill
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.document import python_topics, read_text
from louver.experiments.experiment import Progress, no_progress
from louver.experiments.fitting import GRID, Curves, curves, joined
from louver.kernels import resolve_backend
from louver.policies import Dense, parse
from louver.protocols import Policy

LADDER = (*GRID, "exact:0.5", "exact:1")
MEASURES = ("kl", "top1")
QUERIES = 8  # of every layer that show what a byte buys
SHOWN = 3  # policies that a row names; more are counted
SCOPES = ("head", "layer")
PRICES = tuple(
    4 * 0.5**i for i in range(16)
)  # of all bytes, in mean relative error; from where bytes are dear to where they are cheap


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to tune, and how far it may be off. Every field but backend changes results."""

    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    prompt_file: Path | None = None  # a text file; None: Python's own help topics
    target_error: float = 1e-3  # of the measure, on the held-out tokens
    measure: str = "kl"
    ladder: tuple[str, ...] = LADDER  # what there is to choose from
    scope: str = "head"  # who chooses; policies that are not given to single heads need "layer"
    project: bool = (
        True  # weigh what a head's error moves the layer's output by; False: errors relative to the head's own output
    )
    max_tokens: int = 4096  # the text is cut here
    held_out: int = 128  # tokens at its end
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputFileError(f"measure={self.measure!r} is unknown; wanted one of {', '.join(MEASURES)}")
        if self.scope not in SCOPES:
            raise InputFileError(f"scope={self.scope!r} is unknown; wanted one of {', '.join(SCOPES)}")
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
    rungs = list(dict.fromkeys(parse(spec).spec for spec in config.ladder))
    if config.scope == "head":
        parse(joined(rungs))  # a policy that can't be given to single heads is told now
    model, tokenizer = loaded or (load_model(config.model) if config.model else demo_model())
    ids = _tokens(config, tokenizer)
    known = _curves(config, rungs, model, tokenizer, ids[:, : -config.held_out], on_progress)
    try:
        judge = _Judge(config, model, ids, on_progress)
        return _search(config, rungs, known, judge, on_progress)
    finally:
        model.set_attn_implementation("sdpa")  # as it came


def _tokens(config: Config, tokenizer: Any) -> Tensor:
    """The text as ids [1, n]; the last of them are held out."""
    if config.prompt_file is None:
        text = python_topics(tokenizer, config.max_tokens).text
    else:
        text = read_text(Path(config.prompt_file))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : config.max_tokens]
    if ids.shape[1] <= config.held_out:
        raise InputFileError(f"the text has {ids.shape[1]} tokens; wanted more than the {config.held_out} held out")
    return ids


def _curves(
    config: Config, rungs: list[str], model: Any, tokenizer: Any, ids: Tensor, on_progress: Progress
) -> dict[int, Curves]:
    """Error against bytes of every rung in every layer; of nothing where there is nothing to choose."""
    if len(rungs) == 1:
        return {}
    seen = captures.run(captures.Config(every_layer=True), on_progress, (model, tokenizer), ids=ids)
    backend, found = resolve_backend(config.backend), {}
    for done, (i, layer) in enumerate(seen.layers.items()):
        weight = output_projection(model, i) if config.project else None
        found[i] = curves(seen, layer, backend, rungs, QUERIES, weight)
        on_progress("What a byte buys, layer by layer", done + 1, len(seen.layers))
    return found


def output_projection(model: Any, layer: int) -> Tensor | None:
    """The weight [hidden, channels] that a layer's heads go through; None where the model names it otherwise."""
    attention = getattr(model.get_decoder().layers[layer], "self_attn", None)
    projection = getattr(attention, "o_proj", None)
    return None if projection is None else projection.weight.detach().float().cpu()


def _search(
    config: Config, rungs: list[str], known: dict[int, Curves], judge: "_Judge", on_progress: Progress
) -> Tuning:
    ladder = _frontier(rungs, list(known.values()))
    most = len(ladder).bit_length() + len(PRICES).bit_length() + 3
    tried: dict[str, tuple[float, dict[int, str]]] = {}  # bytes and choice of the last of a stage that met the target

    def meets(stage: str, choice: dict[int, str]) -> bool:
        error, read = judge({i: parse(spec) for i, spec in choice.items()}, stage)
        if error <= config.target_error:
            tried[stage] = (read, choice)
        on_progress("Choices judged on the held-out tokens", len(judge.rows), most)
        return error <= config.target_error

    reached = _first(len(ladder), lambda i: meets("all layers alike", dict.fromkeys(judge.layers, ladder[i])))
    if reached is None:
        raise PolicyError(
            f"no policy of {', '.join(config.ladder)} meets {config.measure} <= {config.target_error:g}; "
            "give a larger target, or a ladder that ends in 'exact:1'"
        )
    found = [tried["all layers alike"]]
    if len(ladder) > 1:
        own = [{i: one.at(price, config.scope == "head") for i, one in known.items()} for price in PRICES]
        stage = f"each {config.scope} at its own"
        _first(len(PRICES), lambda i: meets(stage, own[i]))
        found += [tried[stage]] if stage in tried else []
    chosen = min(found, key=lambda one: one[0])[1]
    default = Counter(chosen.values()).most_common(1)[0][0]
    judge({i: parse(spec) for i, spec in chosen.items()}, "chosen")
    policies = {"default": default} | {str(i): spec for i, spec in sorted(chosen.items()) if spec != default}
    return Tuning(policies=policies, rows=judge.rows, num_layers=judge.num_layers)


def _frontier(rungs: list[str], known: list[Curves]) -> list[str]:
    """The rungs that none beats in both bytes and error over all layers, the cheapest first."""
    if not known:
        return rungs
    error, read = (torch.stack([getattr(c, n) for c in known]).mean((0, 2)) for n in ("error", "bytes_fraction"))
    order = sorted(range(len(rungs)), key=lambda i: (float(read[i]), float(error[i])))
    kept: list[int] = []
    for i in order:
        if not kept or error[i] < error[kept[-1]]:
            kept.append(i)
    return [rungs[i] for i in kept]


def _first(count: int, holds: Callable[[int], bool]) -> int | None:
    """The first of 0 .. count - 1 for which it holds, taking it that it holds from there on; None where it does not at the last."""
    fails, fits = -1, count - 1
    if not holds(fits):
        return None
    while fits - fails > 1:
        middle = (fits + fails) // 2
        if holds(middle):
            fits = middle
        else:
            fails = middle
    return fits


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """e to the mean surprise, in nats, of each token of ids [n] after those before it; logits [n, vocab] are those after each."""
    if len(ids) < 2:
        return float("nan")
    surprise = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:].to(logits.device))
    return surprise.exp().item()


class _Judge:
    """Measures a choice of policies on the held-out tokens; keeps a row for each."""

    def __init__(self, config: Config, model: Any, ids: Tensor, on_progress: Progress) -> None:
        from louver.integrations.transformers import attach

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
        specs = Counter(policy.spec for policy in policies.values())
        self.rows.append(
            {
                "stage": stage,
                "policy": " ".join(f"{n}x{spec}" for spec, n in specs.items()) if len(specs) <= SHOWN else "",
                "num_policies": len(specs),
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
