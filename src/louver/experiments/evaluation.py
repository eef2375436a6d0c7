"""``louver eval``: tasks of lm-evaluation-harness, answered through Louver and anything it is compared with.

A row per task, metric and method. ``score`` is the harness's figure with 1.96 of its standard errors to either side; where the metric is a
share of right answers it is ``accuracy`` too. ``bytes_fraction`` and ``exact_fraction`` are over all decode steps of one entry of ``tasks``,
which may be a group of tasks. The prompt is read densely by every method.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from louver.errors import InputFileError, PolicyError
from louver.experiments.methods import Method, method
from louver.experiments.models import load, model_name
from louver.policies import DEFAULT_POLICY

SHARES_RIGHT = ("acc", "acc_norm", "exact_match", "math_verify")  # metrics that are accuracies
Z = 1.96


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to ask of whom. Every field but ``batch_size`` and ``backend`` changes results."""

    model: str
    tasks: tuple[str, ...]  # tasks, groups or tags of the harness
    policies: tuple[str, ...] = ("dense", DEFAULT_POLICY)  # or any method of experiments.methods
    limit: float | None = None  # samples per task, or a share of them below 1
    num_fewshot: int | None = None  # None: as the task says
    include_path: Path | None = None  # a folder with task files of your own
    chat: bool = False  # go through the model's chat template
    max_length: int | None = None  # tokens of prompt and answer; None: the model's own
    gen_kwargs: str | None = None  # as in the harness: "max_gen_toks=32768,do_sample=true,temperature=0.6"
    metadata: str | None = None  # JSON for the tasks, such as RULER's lengths
    batch_size: int = 1
    backend: str = "auto"
    seed: int = 0

    def methods(self) -> list[Method]:
        """The methods of the rows.

        Raises:
            PolicyError: one can't be read.
        """
        return [method(spec, self.backend) for spec in dict.fromkeys(self.policies)]

    def for_tasks(self) -> dict[str, Any]:
        """``metadata``, read.

        Raises:
            InputFileError: it is no JSON object.
        """
        try:
            read = json.loads(self.metadata or "{}")
        except json.JSONDecodeError as error:
            raise InputFileError(f"--metadata is not JSON: {error}") from None
        if not isinstance(read, dict):
            raise InputFileError(f"--metadata is {read!r}; wanted a JSON object")
        return read


def run(config: Config, loaded: tuple[Any, Any] | None = None) -> list[dict[str, Any]]:
    """Rows of every entry of ``tasks``, method after method. The harness shows its own progress.

    Raises:
        InputFileError: lm-evaluation-harness, the model or a task is not there.
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: a method can't be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputFileError("lm-evaluation-harness is not installed: pip install 'louver[eval]'")
    methods, metadata = config.methods(), config.for_tasks()
    model, tokenizer = load(config.model, loaded=loaded)
    manager = _manager(config, {"pretrained": getattr(model.config, "name_or_path", config.model)} | metadata)
    head = {"data": model_name(model), "device": model.device.type, "num_fewshot": config.num_fewshot}
    rows = []
    try:
        for name in config.tasks:
            for one in methods:
                rows += [head | row for row in _asked(config, name, one, model, tokenizer, manager)]
    finally:
        model.set_attn_implementation("sdpa")
    return rows


def _manager(config: Config, metadata: dict[str, Any]) -> Any:
    """What knows the tasks: the caller's own, and where these are not enough the harness's, whose thousands of files take a while."""
    from lm_eval.tasks import TaskManager

    manager = None
    if config.include_path is not None:
        own = str(config.include_path)
        manager = TaskManager(include_path=own, include_defaults=False, metadata=metadata)
        if not all(manager.match_tasks([name]) for name in config.tasks):
            manager = TaskManager(include_path=own, metadata=metadata)
    manager = manager or TaskManager(metadata=metadata)
    if unknown := [name for name in config.tasks if not manager.match_tasks([name])]:
        raise InputFileError(f"no task {unknown[0]!r}; `lm_eval ls tasks` lists them, --include-path adds your own")
    return manager


def _asked(config: Config, task: str, one: Method, model: Any, tokenizer: Any, manager: Any) -> Iterator[dict]:
    from lm_eval.evaluator import simple_evaluate

    from louver.experiments.harness import LouverLM
    from louver.integrations.transformers import LouverCache, attach

    attach(model)
    make_cache = partial(LouverCache, model.config, layer=one.make)
    lm = LouverLM(model, tokenizer, make_cache, max_length=config.max_length, batch_size=config.batch_size)
    limit = None if config.limit is None else int(config.limit) if config.limit >= 1 else config.limit
    found = simple_evaluate(
        lm,
        tasks=[task],
        num_fewshot=config.num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=config.chat,
        gen_kwargs=config.gen_kwargs,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    if found is None or not lm.tally.num_steps:
        raise PolicyError(f"task {task!r} asked for no decode step, so no method was tested")
    read = {
        "bytes_fraction": lm.tally.bytes_read / lm.tally.bytes_dense,
        "exact_fraction": lm.tally.num_exact / lm.tally.num_keys,
        "num_layer_steps": lm.tally.num_steps,
    }
    for row in scores(found):
        yield row | {"policy": one.spec, "guarantee": one.guarantee} | read


def scores(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the harness's results: a task and a metric each."""
    for task, figures in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {})
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            row: dict[str, Any] = {"task": task, "metric": metric, "filter": filtered}
            if metric.isdigit():  # RULER names its metrics by the length, and scores -1 where a length was not asked
                if value < 0:
                    continue
                row["kv_len"] = int(metric)
            error = figures.get(f"{metric}_stderr,{filtered}")
            reach = Z * error if isinstance(error, int | float) else None
            ends = {"low": None if reach is None else value - reach, "high": None if reach is None else value + reach}
            row |= {"score": value, "score_low": ends["low"], "score_high": ends["high"]}
            if metric in SHARES_RIGHT:
                row |= {"accuracy": value, "accuracy_low": ends["low"], "accuracy_high": ends["high"]}
            yield row | {"num_samples": counted.get("effective")}
