"""The pruning experiment: how many keys each bound leaves to be read, and what that costs in bytes, on a real capture.

tau is each query's k-th largest true score. scanned_fraction: keys a query's bound did not rule out; scanned_union_fraction:
the same for all query heads of a GQA group together, which is what is read. bytes_fraction: the index, the scanned keys and the
selected values over what dense attention reads from a 16-bit cache. work_fraction: multiplications of bounds and scanned keys over those
of scoring every key, the asymptotic cost of a query. build_ms and query_us are of the plain torch code here (a layer; a query).
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from louver.errors import PolicyError
from louver.experiments.capture import Capture, Layer
from louver.experiments.codecs import CODECS, METRICS
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.pruning_methods import Answer, BallMethod, CodecMethod, Method, Question, SketchMethod, in_turn
from louver.geometry.metric import Metric

INDEXES = ("ball", "box", "sketch")
RULES = ("sum", "ta", "and", "oracle-and")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare: a row per combination that makes sense. Every field changes results."""

    capture: Path = option(help="What `louver capture` wrote.")
    targets: tuple[float, ...] = option((20.0, 0.01, 0.05), help="Keys to find: a number, or a share below 1.")
    index: tuple[str, ...] = option(INDEXES, help="ball, box (16 consecutive keys), sketch.")
    rule: tuple[str, ...] = option(RULES, help="Of ball: sum, ta, and, oracle-and.")
    subspaces: tuple[int, ...] = option((1, 8, 16), help="Of ball.")
    group_len: tuple[int, ...] = option((4,), help="Of ball: keys per group.")
    grouping: tuple[str, ...] = option(("kcenter",), help="Of ball: kcenter, consecutive, kmeans.")
    enclosure: tuple[str, ...] = option(("ball",), help="Of ball: ball, box.")
    center: tuple[str, ...] = option(("mean",), help="Of ball: mean, key.")
    slicing: tuple[str, ...] = option(("contiguous",), help="Of ball: contiguous, interleaved, random, rotated.")
    codec: tuple[str, ...] = option(
        ("sketch", "frames", "key4", "key8"), help=f"Of sketch: sketch, {', '.join(CODECS)}."
    )
    planes: tuple[int, ...] = option((1, 2), help="Of sketch: bits read in one plane or two.")
    metric: tuple[str, ...] = option(("frame", "identity", "full"), help="Of sketch: frame, diagonal, identity, full.")

    def __post_init__(self) -> None:
        known = {
            "index": INDEXES,
            "rule": RULES,
            "codec": ("sketch", *CODECS),
            "planes": (1, 2),
            "metric": ("frame", "diagonal", "identity", "full"),
        }
        for name, choices in known.items():
            if bad := [x for x in getattr(self, name) if x not in choices]:
                raise PolicyError(f"{name}={bad[0]!r} is unknown; wanted some of {', '.join(map(str, choices))}")
        if bad := [t for t in self.targets if t <= 0 or (t >= 1 and t != int(t))]:
            raise PolicyError(f"target {bad[0]} is neither a number of keys nor a share of them")


def methods(config: Config) -> Iterator[Method]:
    """Every combination that makes sense; those that share an index follow each other."""
    if "ball" in config.index:
        names = ("subspaces", "group_len", "grouping", "enclosure", "center", "slicing")
        for values in product(*(getattr(config, n) for n in names)):
            options = dict(zip(names, values, strict=True))
            if options["enclosure"] == "box" and options["center"] == "key":
                continue  # a box has no centre
            for rule in config.rule:
                if values[0] > 1 or rule == "sum":  # one subspace has one rule
                    yield BallMethod(rule=rule, options=tuple(options.items()))
    if "box" in config.index:  # Quest's pages
        pages = {"subspaces": 1, "group_len": 16, "grouping": "consecutive", "enclosure": "box"}
        yield BallMethod(rule="sum", options=tuple(pages.items()), name="box")
    if "sketch" in config.index:
        for codec, metric in product(config.codec, config.metric):
            if codec == "sketch":
                for shipped in get_args(Metric):
                    if metric == shipped and 1 in config.planes:
                        yield SketchMethod(metric=shipped)
            elif metric in METRICS[type(CODECS[codec])]:
                for planes in config.planes:
                    yield CodecMethod(codec=codec, metric=metric, planes=planes)


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """Rows, and rows per layer.

    Raises:
        InputFileError: the capture can't be read.
        PolicyError: a combination makes no sense.
    """
    capture, chosen = Capture.load(config.capture), list(methods(config))
    if not chosen:
        raise PolicyError(
            "no combination of these options makes sense (a full metric needs a codec with a scale per key)"
        )
    per_layer: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for done, (i, layer) in enumerate(capture.layers.items()):
        for target, method_index, figures in _measure_layer(capture, layer, chosen, config.targets):
            per_layer[method_index, target].append({"layer": i} | figures)
        on_progress("Pruning, layer by layer", done + 1, len(capture.layers))
    rows, layer_rows = [], []
    for method_index, method in enumerate(chosen):
        for target in config.targets:
            found = per_layer[method_index, target]
            head = capture.shape_fields() | {"backend": "reference", "device": "cpu"} | method.fields()
            head |= {"target": f"{target:g}", "guarantee": method.guarantee}
            rows.append(head | _merge(found))
            layer_rows += [head | one for one in found]
    return rows, {"rows_per_layer": layer_rows}


def ask(capture: Capture, layer: Layer) -> Question:
    """The measured queries of a layer with their true scores; tau is still to be set."""
    heads = layer.keys.shape[0]
    q = layer.queries[:, capture.measured()].float()
    positions = capture.query_positions[capture.measured()].repeat(layer.group_size)
    q = q.unflatten(0, (heads, -1)).flatten(1, 2)
    scores = q.double() @ layer.keys.double().mT
    scores = scores.masked_fill(torch.arange(layer.keys.shape[1]) > positions[:, None], -torch.inf)
    fitting = layer.queries[:, capture.fitting()].float()
    return Question(layer=layer, fitting=fitting, q=q, scores=scores, tau=scores.amax(-1))


def _measure_layer(
    capture: Capture, layer: Layer, chosen: list[Method], targets: tuple[float, ...]
) -> Iterator[tuple[float, int, dict[str, Any]]]:
    question, n = ask(capture, layer), layer.keys.shape[1]
    ordered = question.scores.sort(-1, descending=True).values
    prepared, build_ms = None, 0.0
    for method_index, (method, goes_on) in enumerate(in_turn(chosen)):
        if not goes_on:
            started = time.perf_counter()
            prepared = method.prepare(layer, question.fitting)
            build_ms = 1e3 * (time.perf_counter() - started)
        for target in targets:
            k = max(1, int(target * n)) if target < 1 else min(int(target), n)
            asked = replace(question, tau=ordered[..., k - 1])
            started = time.perf_counter()
            answer = method.answer(prepared, asked)
            query_us = 1e6 * (time.perf_counter() - started) / question.tau.numel()
            found = _figures(answer, asked, k)
            work = {"work_fraction": method.work_per_key + found["scanned_fraction"]}
            yield target, method_index, found | work | {"build_ms": build_ms, "query_us": query_us}


def _figures(answer: Answer, question: Question, k: int) -> dict[str, Any]:
    allowed, relevant = torch.isfinite(question.scores), question.relevant
    candidates = answer.candidates & allowed
    group, dims, n = question.layer.group_size, question.q.shape[2], question.scores.shape[2]

    def union(mask: Tensor) -> float:
        together = mask.unflatten(1, (group, -1)).any(1).sum(-1)
        return (together / allowed.unflatten(1, (group, -1))[:, 0].sum(-1)).mean().item()

    lost = int((relevant & ~candidates).sum())
    scanned, selected = union(candidates), union(relevant)
    second = union(answer.second & allowed) * answer.second_bytes if answer.second is not None else 0.0
    bytes_per_key = answer.index_bytes_per_key + second + 2 * dims * (scanned + selected)
    return {
        "target_fraction": k / n,
        "selected_fraction": (relevant.sum(-1) / allowed.sum(-1)).mean().item(),
        "scanned_fraction": (candidates.sum(-1) / allowed.sum(-1)).mean().item(),
        "scanned_union_fraction": scanned,
        "bytes_fraction": bytes_per_key / (4 * dims),
        "index_bytes_fraction": answer.index_bytes_per_key / (4 * dims),
        "recall": 1 - lost / int(relevant.sum()),
        "num_false_negatives": lost,
        **answer.figures,
    }


def _merge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over layers; counts are added up."""
    merged = {name: sum(one[name] for one in found) / len(found) for name in found[0] if name != "layer"}
    return merged | {"num_false_negatives": sum(one["num_false_negatives"] for one in found)}
