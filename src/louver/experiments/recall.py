"""The recall experiment: of the k keys with the largest scores, how many each method finds, and what that costs.

On a capture. Every method holds the keys up to the end of the fitting queries and answers the measured queries, all of which come
later and so may see them all. Louver answers through its policy ``topk:k``, which is not told the threshold. Nearest-neighbour
indexes return k keys at three settings: their usual one; an index as large as Louver's; and the narrowest search that takes at
least as long as Louver's step. Selections get a budget of k tokens, and multiples of it. H2O and SnapKV judge tokens by the history: here they see
the capture's last fitting queries only, which is all that SnapKV asks for and less than H2O does.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.attention import LouverAttention
from louver.errors import PolicyError
from louver.experiments.baselines import H2O, Ann, AnnOptions, Quest, SnapKV, StreamingLLM, Twilight
from louver.experiments.baselines import ann as anns
from louver.experiments.baselines.selecting import Selecting
from louver.experiments.baselines.trees import KINDS as TREES
from louver.experiments.baselines.trees import Tree
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.index.sketch import SketchIndex
from louver.kernels import resolve_backend
from louver.policies import parse
from louver.protocols import AttendResult

SELECTIONS = {"quest": Quest, "streaming": StreamingLLM, "h2o": H2O, "snapkv": SnapKV}
METHODS = ("louver", *anns.KINDS, *TREES, *SELECTIONS, "twilight")
WINDOW_FORM = {"h2o": "h2o (last-window form)", "snapkv": "snapkv (last-window form)"}
NARROW = {
    "ef_search": 16,
    "num_probes": 2,
    "rescored": 1,
}  # from here a search is widened until it takes as long as Louver's,
WIDEST = 512  # or looks at so many times more


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare: a row per method, setting and k. Every field changes results but ``backend``."""

    capture: Path = option(help="What `louver capture` wrote.")
    k: tuple[int, ...] = option((10, 20, 50, 100), help="Keys wanted.")
    methods: tuple[str, ...] = option(METHODS, help=f"Some of {', '.join(METHODS)}.")
    budgets: tuple[int, ...] = option((1, 8), help="Of selections: their tokens per key wanted.")
    p: tuple[float, ...] = option((0.95,), help="Of twilight: share of the estimated attention.")
    stride: int = option(16, help="Measure every so manieth query of the capture's second half.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")

    def __post_init__(self) -> None:
        if bad := [m for m in self.methods if m not in METHODS]:
            raise PolicyError(f"method {bad[0]!r} is unknown; wanted some of {', '.join(METHODS)}")
        if bad := [k for k in self.k if k < 1]:
            raise PolicyError(f"k={bad[0]}; wanted 1 key or more")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to find keys, ready to answer. ``options`` are an index's, set before each k."""

    method: str
    setting: str
    attention: LouverAttention | Selecting
    options: AnnOptions | None = None
    k: int | None = None  # the only k it answers for; None: any

    @property
    def guarantee(self) -> str:
        """What a row may claim."""
        return "exact" if isinstance(self.attention, LouverAttention) else "none"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A layer's keys, the queries to ask (a query token each) and their true scores."""

    keys: Tensor  # [1, num_kv_heads, n, head_dim]
    queries: Tensor  # [places, num_q_heads, head_dim]
    scores: Tensor  # float64 [places, num_q_heads, n]
    softmax_scale: float

    def relevant(self, k: int) -> Tensor:
        """The keys that must be found, ties included."""
        return self.scores >= self.scores.topk(k, -1).values[..., -1:]


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """Rows, and rows per layer.

    Raises:
        InputFileError: the capture can't be read.
        PolicyError, BackendError: a setting can't be used.
    """
    capture = Capture.load(config.capture)
    backend = resolve_backend(config.backend)
    layer_rows = []
    for done, (i, layer) in enumerate(capture.layers.items()):
        on_progress("Recall, layer by layer", done, len(capture.layers))
        layer_rows += [{"layer": i} | row for row in _measure_layer(capture, layer, config, backend)]
    on_progress("Recall, layer by layer", len(capture.layers), len(capture.layers))
    head = capture.shape_fields() | {"backend": backend, "device": "cpu"}
    rows = []
    for key in dict.fromkeys((row["index"], row["setting"], row["k"]) for row in layer_rows):
        mine = [row for row in layer_rows if (row["index"], row["setting"], row["k"]) == key]
        rows.append(head | _merge(mine))
    return rows, {"rows_per_layer": [head | row for row in layer_rows]}


def ask(capture: Capture, layer: Layer, stride: int) -> tuple[Question, Tensor]:
    """The question, and the fitting queries [1, num_q_heads, m, head_dim] of the last keys' tokens."""
    fitting = layer.queries[None, :, capture.fitting()].float()
    n = int(capture.query_positions[capture.fitting()][-1]) + 1
    queries = layer.queries[:, capture.measured(stride)].float().transpose(0, 1).contiguous()
    keys = layer.keys[None, :, :n].float()
    scores = queries.double().unflatten(1, (keys.shape[1], -1)) @ keys.double().mT
    scale = capture.softmax_scale
    return Question(keys=keys, queries=queries, scores=scores.flatten(1, 2), softmax_scale=scale), fitting


def _measure_layer(capture: Capture, layer: Layer, config: Config, backend: str) -> Iterator[dict[str, Any]]:
    question, fitting = ask(capture, layer, config.stride)
    values = layer.values[None, :, : question.keys.shape[2]].float()
    louver = LouverAttention(f"topk:{config.k[0]}", backend=backend)
    _fill(louver, question, values, fitting)
    assert isinstance(louver.index, SketchIndex)
    index_bytes = float(louver.index.bytes_per_search[0, 0]) / question.keys.shape[2]
    wanted = {k: _search_us(louver, question, k) for k in config.k}
    for contender in _contenders(config, louver, question, index_bytes):
        if contender.attention is not louver:
            _fill(contender.attention, question, values, fitting)
        for k in config.k if contender.k is None else (contender.k,):
            yield from _answers(contender, question, k, wanted[k])


def _fill(attention: LouverAttention | Selecting, question: Question, values: Tensor, fitting: Tensor) -> None:
    attention.append(question.keys, values)
    attention.observe(fitting, None, question.softmax_scale)
    attention.record = True


def _contenders(config: Config, louver: LouverAttention, question: Question, index_bytes: float) -> Iterator[Contender]:
    n, head_dim = question.keys.shape[2:]
    for method in config.methods:
        if method == "louver":
            yield Contender(method=method, setting="proven", attention=louver)
        elif method in anns.KINDS:
            usual, sized = AnnOptions(kind=method), size_matched(method, n, head_dim, index_bytes)
            yield Contender(method=method, setting="usual", attention=Ann(method, 1.0), options=usual)
            yield Contender(method=method, setting="same size", attention=Ann(method, 1.0), options=sized)
        elif method in TREES:
            yield Contender(method=method, setting="usual", attention=Tree(method, 1.0))
        elif method == "twilight":
            for p in config.p:
                yield Contender(method=method, setting=f"p = {p:g}", attention=Twilight(p))
        else:
            name = WINDOW_FORM.get(method, method)
            for factor, k in product(config.budgets, config.k):
                attention = SELECTIONS[method](min(factor * k, n))  # of its own: what is evicted never comes back
                yield Contender(method=name, setting=f"{factor} k tokens", attention=attention, k=k)


def size_matched(kind: str, n: int, head_dim: int, index_bytes: float) -> AnnOptions:
    """The setting whose index takes about index_bytes per key, beyond the keys themselves."""
    lists = max(1, min(n // 4, int(n * index_bytes / (2 * head_dim))))
    usual = AnnOptions(kind=kind)
    return replace(
        usual,
        neighbors=max(2, int(index_bytes / 8)),  # 2 M links of 4 bytes per key on the lowest level
        num_lists=lists,
        num_probes=max(1, round(usual.num_probes * lists / (4 * n**0.5))),  # the usual share of the keys
        num_codes=max(m for m in range(1, head_dim + 1) if head_dim % m == 0 and m <= index_bytes),
        bits_per_channel=max(1, round(8 * index_bytes / head_dim)),
    )


def _answers(contender: Contender, question: Question, k: int, louver_us: float) -> Iterator[dict[str, Any]]:
    attention = contender.attention
    if isinstance(attention, LouverAttention):
        attention.policy = parse(f"topk:{k}")
    elif isinstance(attention, Ann | Tree):
        attention.budget = min(k, question.keys.shape[2])
    if isinstance(attention, Ann) and contender.options is not None:
        attention.options = contender.options
    us = louver_us if isinstance(attention, LouverAttention) else _search_us(attention, question, k)
    yield _row(contender, question, k, us)
    if isinstance(attention, Ann) and contender.setting == "usual":
        wider = 1
        while True:
            attention.options = widened(contender.options, wider)
            us, wider = _search_us(attention, question, k), 2 * wider
            if us >= louver_us or wider > WIDEST:
                break
        yield _row(replace(contender, setting="same time"), question, k, us)


def widened(options: AnnOptions | None, times: int) -> AnnOptions:
    """The same index, searched so many times wider than NARROW."""
    assert options is not None
    return replace(options, **{name: times * value for name, value in NARROW.items()})


def _search_us(attention: LouverAttention | Selecting, question: Question, k: int) -> float:
    """Median time to find the keys of one query token, all heads; for Louver the whole step, attention over them included."""
    times = []
    valid = torch.ones(1, question.keys.shape[2], dtype=torch.bool)
    if isinstance(attention, LouverAttention):
        attention.policy, attention.record = parse(f"topk:{k}"), False
    for place, q in enumerate(question.queries):
        if place == 0 and isinstance(attention, Selecting):  # builds what is not built yet
            attention.select(q[None], valid, question.softmax_scale)
        started = time.perf_counter()
        if isinstance(attention, Selecting):
            attention.select(q[None], valid, question.softmax_scale)
        else:
            attention.attend(q[None], question.softmax_scale)
        times.append(time.perf_counter() - started)
    attention.record = True
    return 1e6 * float(torch.tensor(times).median())


def _row(contender: Contender, question: Question, k: int, search_us: float) -> dict[str, Any]:
    relevant, missed, results = question.relevant(k), 0, []
    for place, q in enumerate(question.queries):
        result: AttendResult = contender.attention.attend(q[None], question.softmax_scale)
        assert result.exact_mask is not None
        missed += int((relevant[place] & ~result.exact_mask[0]).sum())
        results.append(result)
    queries = relevant.shape[0] * relevant.shape[1]
    held = contender.attention.memory_bytes()["index"] / (4 * question.keys.numel())
    masks = [result.exact_mask for result in results if result.exact_mask is not None]
    scanned = sum(result.stats.fraction("scanned") for result in results) / len(results)
    return {
        "index": contender.method,
        "setting": contender.setting,
        "k": k,
        "recall": 1 - missed / int(relevant.sum()),
        "num_false_negatives": missed,
        "num_queries": queries,
        "false_negatives_per_query": missed / queries,
        "selected_fraction": float(torch.cat([mask.double().mean(-1) for mask in masks]).mean()),
        "scanned_fraction": scanned,
        "bytes_fraction": sum(result.stats.bytes_fraction for result in results) / len(results),
        "index_memory_fraction": held,
        "search_us": search_us,
        "guarantee": contender.guarantee,
    }


def _merge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Over layers: counts are added up, everything else is averaged."""
    names = [name for name, value in found[0].items() if isinstance(value, float)]
    merged = {name: value for name, value in found[0].items() if name != "layer"}
    merged |= {name: sum(row[name] for row in found) / len(found) for name in names}
    return merged | {name: sum(row[name] for row in found) for name in ("num_false_negatives", "num_queries")}
