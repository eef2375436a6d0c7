"""The quality experiment: right answers against bytes read, for Louver and everything it is compared with.

Synthetic long-context tasks (experiments/long_tasks.py) at several lengths. Each batch of samples is read once, with dense attention; every
method then answers after that same prompt, so differences between methods are paired and none is luck of the sample. A task that
the model itself answers right less often than ``floor`` says nothing about methods; it is reported for dense alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from louver.errors import InputFileError
from louver.experiments.answers import Judged
from louver.experiments.branching import Prompt
from louver.experiments.compare import forced
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.journal import Journal
from louver.experiments.long_tasks import LONG_TASKS, SHORTEST_TOKENS, LongBatch, haystack, long_batch
from louver.experiments.methods import Method, method
from louver.experiments.models import load, model_name
from louver.experiments.words import Vocabulary

METHODS = (
    "dense,exact:0.002,exact:0.01,exact:0.05,error:0.2,mass:0.05,budget:0.01,budget:0.05,budget:0.1,budget:0.2,"
    "fp8,kivi4,streaming:0.2,streaming:0.35,"
    "snapkv:0.1,snapkv:0.2,snapkv:0.35,quest:0.05,quest:0.1,quest:0.2,twilight:0.85,twilight:0.95,torch-ivf:0.05,torch-ivf:0.1,"
    "h2o:0.2,h2o:0.35"
)
ALL = "all"  # tasks that the model can do
LONG_TOKENS = 8192  # from here on, fewer samples


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to ask, and of whom. Every field but ``batch`` and ``backend`` changes results."""

    model: str = option("demo", help="A folder, a name on the model hub, or demo for the offline model.")
    tasks: tuple[str, ...] = option(tuple(LONG_TASKS), help=f"Any of {', '.join(LONG_TASKS)}.")
    kv_lens: tuple[int, ...] = option((1024, 2048, 4096, 8192), help="Tokens of the prompts.")
    policies: tuple[str, ...] = option(
        tuple(METHODS.split(",")),
        help="dense, Louver's policies, fp8, kivi4, and streaming, h2o, snapkv, quest, torch-ivf with a budget, twilight with its p.",
    )
    num_samples: int = option(100, help="Samples per task and length.")
    num_samples_long: int = option(25, help=f"The same from {LONG_TOKENS:,} tokens on.")
    floor: float = option(0.2, help="Leave out what the model gets right less often than this with dense attention.")
    batch: int = option(8, help="Samples read together (speed and memory only).")
    backend: str = option("auto", help="Which kernels; auto is the fastest here (speed only).")
    seed: int = option(0, help="Of the samples.")

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(LONG_TASKS):
            raise InputFileError(f"tasks {sorted(unknown)} are unknown; wanted any of {', '.join(LONG_TASKS)}")
        if min(self.num_samples, self.num_samples_long, self.batch) < 1:
            raise InputFileError("num_samples, num_samples_long and batch must be at least 1")
        if short := [n for n in self.kv_lens if n < SHORTEST_TOKENS]:
            raise InputFileError(f"kv_lens {short} are too short; wanted at least {SHORTEST_TOKENS} tokens")
        self.methods()

    def methods(self) -> list[Method]:
        """The methods, dense among them.

        Raises:
            PolicyError: one can't be read.
        """
        return [method(spec, self.backend) for spec in dict.fromkeys(("dense", *self.policies))]

    def samples_at(self, kv_len: int) -> int:
        """Samples of a task at this length."""
        return self.num_samples_long if kv_len >= LONG_TOKENS else self.num_samples


def run(
    config: Config,
    on_progress: Progress = no_progress,
    loaded: tuple[Any, Any] | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """A row per task, length and method; then one per length and method, and per method, over all tasks the model can do.

    What ``journal`` holds is not measured again.

    Raises:
        InputFileError: the model isn't there, or a task does not fit a length.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    model, tokenizer = load(config.model, on_progress, loaded)
    vocabulary = Vocabulary(tokenizer)
    text = haystack(vocabulary)
    cells = [(kv_len, task) for kv_len in config.kv_lens for task in config.tasks]
    able: dict[int, list[Cell]] = {}
    rows: list[dict[str, Any]] = []
    head = {"data": model_name(model), "device": model.device.type}
    try:
        for done, (kv_len, task) in enumerate(cells):
            on_progress("Answer, task by task", done, len(cells))
            batch = long_batch(task, vocabulary, text, kv_len, config.samples_at(kv_len), config.seed)
            key = {"model": config.model, "task": task, "kv_len": kv_len, "seed": config.seed}
            cell = measure(config, Asked(model, batch, journal or Journal(), key))
            rows += [head | {"task": task, "kv_len": kv_len} | row for row in rows_of(config, cell)]
            if len(cell) > 1:
                able.setdefault(kv_len, []).append(cell)
    finally:
        model.set_attn_implementation("sdpa")
    on_progress("Answer, task by task", len(cells), len(cells))
    for kv_len, parts in able.items():
        rows += [head | {"task": ALL, "kv_len": kv_len} | row for row in rows_of(config, joined(parts))]
    if able:
        whole = joined([cell for parts in able.values() for cell in parts])
        rows += [head | {"task": ALL, "kv_len": None} | row for row in rows_of(config, whole)]
    return rows, {}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one method answered, and what that cost; the shares are means over samples."""

    judged: Judged
    bytes_fraction: float
    exact_fraction: float

    @classmethod
    def joined(cls, parts: list["Answers"]) -> "Answers":
        """All samples together."""
        sizes = [part.judged.correct.numel() for part in parts]

        def mean(name: str) -> float:
            return sum(n * getattr(part, name) for n, part in zip(sizes, parts, strict=True)) / sum(sizes)

        judged = Judged.joined([part.judged for part in parts])
        return cls(judged=judged, bytes_fraction=mean("bytes_fraction"), exact_fraction=mean("exact_fraction"))

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self) | {"judged": self.judged.plain()}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> "Answers":
        """What ``plain`` gave."""
        shares = {name: plain[name] for name in ("bytes_fraction", "exact_fraction")}
        return cls(judged=Judged.read(plain["judged"]), **shares)


Cell = dict[str, Answers]  # by method


def joined(cells: list[Cell]) -> Cell:
    """Several cells as one."""
    return {spec: Answers.joined([cell[spec] for cell in cells]) for spec in cells[0]}


class Asked:
    """The samples of one task and length, asked of methods part by part; what the journal has is not asked again."""

    def __init__(self, model: Any, samples: LongBatch, journal: Journal, key: dict[str, Any]) -> None:
        self.samples = samples
        self._model, self._journal, self._key = model, journal, key
        self._read: tuple[slice, Prompt] | None = None  # the prompts read last

    def answers(self, methods: list[Method], part: slice) -> Cell:
        """What these methods answer to a part of the samples."""
        keys = {one.spec: {**self._key, "samples": [part.start, part.stop], "policy": one.spec} for one in methods}
        cell = {
            spec: Answers.read(kept) for spec, key in keys.items() if (kept := self._journal.get(**key)) is not None
        }
        missing = [one for one in methods if one.spec not in cell]
        if not missing:
            return cell
        prompt, answers, counts = self._prompt(part), self.samples.answers[part], self.samples.counts[part]
        full = prompt.forced(prompt.recorded, answers).logits
        for one, decoded in forced(prompt, missing, answers):
            judged = Judged.of(decoded.logits, full, answers, counts)
            shares = {name: getattr(decoded, name) for name in ("bytes_fraction", "exact_fraction")}
            cell[one.spec] = Answers(judged=judged, **shares)
            self._journal.put(cell[one.spec].plain(), **keys[one.spec])
        return cell

    def _prompt(self, part: slice) -> Prompt:
        if self._read is None or self._read[0] != part:
            self._read = None  # give the memory back before more is taken
            self._read = part, Prompt.read(self._model, self.samples.prompts[part])
        return self._read[1]


def measure(config: Config, asked: Asked) -> Cell:
    """The answers of every method to one task at one length; of dense alone where the model is below the floor."""
    dense, *others = config.methods()
    total = len(asked.samples.prompts)
    parts = [slice(start, min(start + config.batch, total)) for start in range(0, total, config.batch)]
    cells = [asked.answers([dense], part) for part in parts]
    if joined(cells)["dense"].judged.correct.double().mean() < config.floor:
        return joined(cells)
    for cell, part in reversed(list(zip(cells, parts, strict=True))):  # the part read last comes first
        cell |= asked.answers(others, part)
    return joined(cells)


def rows_of(config: Config, cell: Cell) -> Iterator[dict[str, Any]]:
    """A row per method."""
    dense = cell["dense"].judged
    usual = dense.fields(config.seed)
    for one in config.methods():
        if one.spec not in cell:
            continue
        answers = cell[one.spec]
        fields = answers.judged.fields(config.seed)
        yield {
            "policy": one.spec,
            "guarantee": one.guarantee,
            "bytes_fraction": answers.bytes_fraction,
            "exact_fraction": answers.exact_fraction,
            **fields,
            **answers.judged.beside(dense, config.seed),
            "dense_accuracy": usual["accuracy"],
            "within_dense_interval": usual["accuracy_low"] <= fields["accuracy"] <= usual["accuracy_high"],
        }
