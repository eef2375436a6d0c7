"""The false-negatives experiment: hide keys from attention and see whether the answer survives.

Lists to add up, to look something up in, and pairs to recall one of. The prompt is read in full; then, at every decode step, keys are hidden
in all layers and heads: the one the step's token has to be read from, or others that hold nothing it needs, or more of either, or
a random share of all. Accuracy, agreement and KL are against the same model with nothing hidden, on the same samples.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.answers import Judged
from louver.experiments.baselines.hidden import Hidden
from louver.experiments.branching import Prompt
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.list_tasks import LIST_TASKS, ListSample, list_samples
from louver.experiments.models import load, model_name
from louver.experiments.words import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to hide, in which tasks. Every field but ``batch`` changes results."""

    model: str = option("demo", help="A folder, a name on the model hub, or demo for the offline model.")
    tasks: tuple[str, ...] = option(tuple(LIST_TASKS), help=f"Any of {', '.join(LIST_TASKS)}.")
    num_samples: int = option(200, help="Samples per point.")
    counts: tuple[int, ...] = option((1, 2, 4, 8), help="How many keys to hide at a time.")
    fractions: tuple[float, ...] = option((0.01, 0.05, 0.1, 0.2, 0.4), help="Random shares of all keys to hide.")
    batch: int = option(200, help="Samples read together (speed only).")
    seed: int = option(0, help="Of the samples and of what is hidden.")

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch < 1:
            raise InputFileError(f"num_samples={self.num_samples} and batch={self.batch}; wanted at least 1")
        if unknown := set(self.tasks) - set(LIST_TASKS):
            raise InputFileError(f"tasks {sorted(unknown)} are unknown; wanted any of {', '.join(LIST_TASKS)}")
        if any(not 0 < f < 1 for f in self.fractions) or any(k < 1 for k in self.counts):
            raise InputFileError(f"fractions={self.fractions} must be shares below 1, counts={self.counts} at least 1")


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """What every step overlooks."""

    kind: str  # nothing, relevant, separator, other item, first token, irrelevant, relevant and irrelevant, random
    count: int = 0  # keys; 0 for a random share
    fraction: float = 0.0

    def positions(self, sample: ListSample, step: int, rng: random.Random) -> list[int] | None:
        """The prompt's positions one step overlooks; None where the sample has not so many to hide."""
        needed = sample.relevant[step]
        idle = [i for i in sample.separators + sample.others if i not in sample.relevant]
        if self.kind == "nothing":
            return []
        if self.kind == "relevant":
            return [needed]
        if self.kind == "first token":
            return [0]
        if self.kind == "random":
            return rng.sample(range(len(sample.prompt) - 1), round(self.fraction * (len(sample.prompt) - 1)))
        pool = {"separator": sample.separators, "other item": sample.others}.get(self.kind, idle)
        with_needed = self.kind == "relevant and irrelevant"
        wanted = self.count - with_needed
        return None if wanted > len(pool) else rng.sample(pool, wanted) + [needed] * with_needed

    def mask(self, samples: list[ListSample], seed: int) -> Bool[Tensor, "batch steps prompt_len"] | None:
        """What each step of each sample overlooks."""
        hidden = torch.zeros(len(samples), len(samples[0].answer), len(samples[0].prompt), dtype=torch.bool)
        for row, sample in enumerate(samples):
            rng = random.Random(f"{seed}-{row}-{self}")
            for step in range(len(sample.answer)):
                found = self.positions(sample, step, rng)
                if found is None:
                    return None
                hidden[row, step, found] = True
        return hidden


def hidings(config: Config) -> Iterator[Hiding]:
    """All of them, nothing hidden first."""
    yield Hiding(kind="nothing")
    for kind in ("relevant", "separator", "other item", "first token"):
        yield Hiding(kind=kind, count=1)
    for count in config.counts:
        yield Hiding(kind="irrelevant", count=count)
        if count > 1:
            yield Hiding(kind="relevant and irrelevant", count=count)
    for fraction in config.fractions:
        yield Hiding(kind="random", fraction=fraction)


def run(config: Config, on_progress: Progress = no_progress, loaded: tuple[Any, Any] | None = None) -> Outcome:
    """A row per task and hiding.

    Raises:
        InputFileError: the model isn't there, or a task can't be made with its tokenizer.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    model, tokenizer = load(config.model, on_progress, loaded)
    vocabulary = Vocabulary(tokenizer)
    rows = []
    try:
        for done, task in enumerate(config.tasks):
            on_progress("Hide keys, task by task", done, len(config.tasks))
            samples = list_samples(task, vocabulary, config.num_samples, config.seed)
            head = {
                "data": model_name(model),
                "task": task,
                "kv_len": len(samples[0].prompt),
                "device": model.device.type,
            }
            for hiding, judged, share in _measure(config, model, samples):
                hid = {"hidden": hiding.kind, "num_hidden": hiding.count or None, "hidden_fraction": share}
                rows.append(head | hid | judged.fields(config.seed) | {"guarantee": "none"})
    finally:
        model.set_attn_implementation("sdpa")
    on_progress("Hide keys, task by task", len(config.tasks), len(config.tasks))
    return rows, {}


def _measure(config: Config, model: Any, samples: list[ListSample]) -> Iterator[tuple[Hiding, Judged, float]]:
    found: dict[Hiding, list[tuple[Judged, float]]] = {}
    for start in range(0, len(samples), config.batch):
        part = samples[start : start + config.batch]
        prompt = Prompt.read(model, torch.tensor([sample.prompt for sample in part]))
        answers = torch.tensor([sample.answer for sample in part])
        full = prompt.forced(prompt.recorded, answers).logits
        for hiding in hidings(config):
            mask = hiding.mask(part, config.seed + start)
            if mask is None:
                continue
            logits = prompt.forced(prompt.served_by(lambda _, mask=mask: Hidden(mask)), answers).logits
            found.setdefault(hiding, []).append((Judged.of(logits, full, answers), mask.double().mean().item()))
    for hiding, parts in found.items():
        yield hiding, Judged.joined([judged for judged, _ in parts]), sum(share for _, share in parts) / len(parts)
