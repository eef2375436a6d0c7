"""The denoising experiment: does dropping keys ever help?

The paper reports a model that answers better with less attention (MATH-500: 62 against 58). Here retrieval keeps from nearly nothing to
everything, on the tasks of the quality experiment and on plain text, beside dense attention on the same samples. A gain is one when the
interval of the paired difference lies above zero.
"""

from dataclasses import dataclass
from typing import Any

from louver.experiments import perplexity, quality
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.journal import Journal
from louver.experiments.models import load

KEPT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to keep, and where to look. Every field but ``batch`` and ``backend`` changes results."""

    model: str = option("demo", help="A folder, a name on the model hub, or demo for the offline model.")
    kept: tuple[float, ...] = option(
        KEPT, help="Shares of the keys to keep: the bar tau is the score of the last one kept."
    )
    tasks: tuple[str, ...] = option(("single-needle", "multi-key", "documents", "quote"), help="As for quality.")
    kv_lens: tuple[int, ...] = option((2048,), help="Tokens of the prompts.")
    num_samples: int = option(100, help="Samples per task.")
    text_len: int = option(4096, help="Tokens of text read before the ones that are judged.")
    num_texts: int = option(32, help="Stretches of text; 0 leaves the text out.")
    batch: int = option(8, help="Samples read together (speed and memory only).")
    backend: str = option("auto", help="Which kernels; auto is the fastest here (speed only).")
    seed: int = option(0, help="Of the samples.")

    def __post_init__(self) -> None:
        self.on_tasks()

    @property
    def policies(self) -> tuple[str, ...]:
        """Dense, and a budget per share."""
        return ("dense", *(f"budget:{share:g}" for share in self.kept))

    def on_tasks(self) -> quality.Config:
        """The settings of the quality experiment."""
        names = ("model", "tasks", "kv_lens", "num_samples", "policies", "batch", "backend", "seed")
        return quality.Config(**{name: getattr(self, name) for name in names}, floor=0.0)

    def on_text(self) -> perplexity.Config:
        """The settings of the perplexity experiment."""
        shared = {name: getattr(self, name) for name in ("model", "policies", "batch", "backend", "seed")}
        return perplexity.Config(**shared, kv_len=self.text_len, num_samples=self.num_texts)


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """A row per task and share kept, then one per share for text. What ``journal`` holds is not measured again.

    Raises:
        InputFileError: the model isn't there, or a task does not fit a length.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    loaded = load(config.model, on_progress, loaded)
    rows, _ = quality.run(config.on_tasks(), on_progress, loaded, journal)
    rows = [row for row in rows if row["task"] != "all" or row["kv_len"] is None]  # pooled once, over all lengths
    if config.num_texts:
        text, _ = perplexity.run(config.on_text(), on_progress, loaded, journal)
        rows += [{"task": "text", **row} for row in text]
    for row in rows:
        row["kept_fraction"] = None if row["policy"] == "dense" else float(row["policy"].partition(":")[2])
    return rows, {}
