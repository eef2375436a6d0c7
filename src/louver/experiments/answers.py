"""Answers judged: right or wrong, and how close to what the full model says."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.experiments.decoding import kl_nats
from louver.experiments.intervals import accuracy, bootstrap


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Per sample: whether the whole answer is right; per token of it: agreement with the full model, KL and surprise in nats."""

    correct: Bool[Tensor, " samples"]
    agreement: Float[Tensor, " samples"]  # share of the answer's tokens where both find the same token most probable
    kl: Float[Tensor, " samples"]  # KL(full model || this one), mean over the answer's tokens
    surprise: Float[Tensor, " samples"]  # -log p of the expected tokens, mean over them

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "samples steps vocab"],
        full: Float[Tensor, "samples steps vocab"],
        expected: Int[Tensor, "samples steps"],
        counts: Bool[Tensor, "samples steps"] | None = None,
    ) -> "Judged":
        """Judge logits that predict ``expected``, beside those of the full model. Steps with counts False are padding."""
        expected = expected.to(logits.device)
        counts = torch.ones_like(expected, dtype=torch.bool) if counts is None else counts.to(logits.device)
        best = logits.argmax(-1)
        parts = zip(full, logits, strict=True)  # sample by sample: float64 of all of them would not fit
        kl = torch.stack([kl_nats(p, q) for p, q in parts])
        surprise = -logits.log_softmax(-1).gather(-1, expected[..., None])[..., 0].double()

        def mean(x: Tensor) -> Tensor:
            return ((x * counts).sum(1) / counts.sum(1)).double().cpu()

        return cls(
            correct=((best == expected) | ~counts).all(1).cpu(),
            agreement=mean((best == full.argmax(-1)).double()),
            kl=mean(kl),
            surprise=mean(surprise),
        )

    @classmethod
    def joined(cls, parts: list["Judged"]) -> "Judged":
        """Samples of several batches as one."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def plain(self) -> dict[str, list[Any]]:
        """As JSON can hold it."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def read(cls, plain: dict[str, list[Any]]) -> "Judged":
        """What ``plain`` gave."""
        kinds = {"correct": torch.bool}
        return cls(**{name: torch.tensor(x, dtype=kinds.get(name, torch.float64)) for name, x in plain.items()})

    def fields(self, seed: int = 0) -> dict[str, float | int | bool]:
        """Fields of a result row, with 95% intervals over samples."""
        right = accuracy(self.correct, seed)
        return {
            "num_samples": self.correct.numel(),
            **right.fields("accuracy"),
            "is_verdict": right.is_verdict,
            **accuracy(self.agreement == 1, seed).fields("all_tokens_agree"),
            "top1_agreement": self.agreement.mean().item(),
            **bootstrap(self.kl, seed).fields("kl_nats"),
            "surprise_nats": self.surprise.mean().item(),
        }

    def beside(self, dense: "Judged", seed: int = 0) -> dict[str, float]:
        """The paired difference in accuracy to dense on the same samples, with its interval."""
        return bootstrap(self.correct.double() - dense.correct.double(), seed).fields("accuracy_gain")
