"""The profile: would Louver help this model at this length? One forward pass over a text, every layer and head looked at.

Predicted from queries of the text itself: how many keys hold 90 and 99% of a head's attention, what each candidate policy reads
and how far off its output is. The bytes are then measured: the end of the text is decoded through a LouverCache, whose own
counts stand beside the prediction. Speed-ups are predicted from bytes, of attention and of a whole decode step whose time goes
into reading 16-bit weights and cache: what a machine limited by memory would show. The time of a step on this device is predicted from
its kernels' figures (step_time.py) at the profiled length and beyond, and measured, beside dense attention, where the decode went.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.experiments import capture as captures
from louver.experiments.capture import Capture, Layer
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.precision import Figures, measure_layer
from louver.experiments.pruning import ask
from louver.experiments.step_time import LONGEST, KernelTimes, beside_attention_ms, decoded_in_turn, kernel_times
from louver.experiments.truth import sketch_of
from louver.kernels import resolve_backend
from louver.policies import parse

SHARES = (0.9, 0.99)  # of the mass
FURTHER = (1, 4, 16)  # times the profiled length: where a step's time is predicted
WORTHWHILE_SPEEDUP = 1.05  # of a whole step; below it the simpler thing is better


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to profile. Every field but backend changes results."""

    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    prompt_file: Path | None = None  # a text file; None: Python's own help topics
    max_tokens: int = 4096  # the text is cut here: profile at the length you mean to serve
    policies: tuple[str, ...] = ("exact:0.002", "exact:0.01", "exact:0.03")
    shown: str = "exact:0.01"  # the policy whose figures stand in the rows per layer and head
    wanted_error: float = 0.01  # mean relative output error that is good enough for the recommendation
    num_queries: int = 256
    num_steps: int = 16  # the text's last tokens, decoded by the policy shown to measure what was predicted; 0: do not
    backend: str = "auto"  # speed only


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A row per policy, rows per layer and head for the policy shown, and what to do."""

    rows: list[dict[str, Any]]
    rows_per_layer: list[dict[str, Any]]
    rows_per_head: list[dict[str, Any]]
    rows_by_length: list[
        dict[str, Any]
    ]  # predicted time of a step, the policy's and a dense one, at the profiled length and beyond; or none
    kernel_times: dict[str, Any]  # this device's figures behind them
    recommendation: dict[str, Any]


def run(
    config: Config,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    loaded: tuple[Any, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Profile:
    """Profile a model. ``loaded`` is a (model, tokenizer) that is already there; say as in demo_model.

    Raises:
        InputFileError: the model or the text is not there, or the text is too short.
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: a policy can't be read.
    """
    backend = resolve_backend(config.backend)
    specs = dict.fromkeys([*config.policies, config.shown])
    chosen = [parse(spec) for spec in specs]
    model, tokenizer = loaded or (demo_model(say) if config.model is None else load_model(config.model))
    wanted = captures.Config(
        model=config.model,
        prompt_file=config.prompt_file,
        max_tokens=config.max_tokens,
        num_queries=config.num_queries,
        every_layer=True,
    )
    seen = captures.run(wanted, on_progress, (model, tokenizer), say)
    shown = parse(config.shown).spec
    found: dict[str, list[Figures]] = {one.spec: [] for one in chosen}
    per_layer: list[dict[str, Any]] = []
    per_head: list[dict[str, Any]] = []
    for done, (i, layer) in enumerate(seen.layers.items()):
        here = dict((one.spec, figures) for one, figures in measure_layer(seen, layer, list(chosen), backend))
        for spec, figures in here.items():
            found[spec].append(figures)
        needed = _keys_needed(seen, layer)
        memory = sketch_of(seen, layer, backend).memory_bytes() / (2 * layer.keys.numel() * 2)
        per_layer.append(_layer_row(i, shown, here, needed, memory, config.wanted_error))
        per_head += _head_rows(i, shown, here, needed, config.wanted_error)
        on_progress("Looking at every layer", done + 1, len(seen.layers))
    weights = sum(p.numel() for p in model.parameters()) * 2
    cache = sum(2 * layer.keys.numel() * 2 for layer in seen.layers.values())
    memory = sum(row["index_memory_fraction"] for row in per_layer) / len(per_layer)
    rows = []
    for spec, parts in found.items():
        row: dict[str, Any] = seen.shape_fields() | {
            "policy": spec,
            "guarantee": "certified",
            "backend": backend,
            "device": "cpu",
        }
        row |= Figures.joined(parts).row()
        share = row["bytes_fraction"]
        row |= {
            "speedup_attention_predicted": 1 / share,
            "speedup_step_predicted": (weights + cache) / (weights + cache * share),
            "index_memory_fraction": memory,
        }
        rows.append(row)
    by_length: list[dict[str, Any]] = []
    device: dict[str, Any] = {}
    if config.num_steps:
        ids = captures.text_tokens(tokenizer, wanted)
        total, layers, measured_ms = decoded_in_turn(model, ids, shown, config.num_steps, backend, on_progress)
        measured = {one.layer_idx: one.bytes_fraction for one in layers}
        shown_row = next(row for row in rows if row["policy"] == shown)
        _compare(shown_row, total.bytes_fraction)
        for row in per_layer:
            _compare(row, measured[row["layer"]])
        if model.device.type == "cpu":
            on_progress("Timing this device's kernels", 0, 1)
            times = kernel_times(_shape(seen), ids.shape[1], backend)
            rest = beside_attention_ms(model, ids, times, backend)
            device = vars(times) | {"beside_attention_ms": rest, "crossover_tokens": _crossover(times, per_layer)}
            head = {"data": shown_row["data"], "backend": backend}
            for further in FURTHER:
                ours, dense = _predicted(times, rest, per_layer, ids.shape[1] * further)
                by_length += [head | {"policy": shown, "guarantee": "certified"} | ours]
                by_length += [head | {"policy": "dense", "guarantee": "exact"} | dense]
            _beside(by_length[0], measured_ms["policy"])
            _beside(by_length[1], measured_ms["dense"])
            shown_row |= _timed(*by_length[:2])
            on_progress("Timing this device's kernels", 1, 1)
    return Profile(
        rows=rows,
        rows_per_layer=per_layer,
        rows_per_head=per_head,
        rows_by_length=by_length,
        kernel_times=device,
        recommendation=recommend(rows, config),
    )


def _shape(seen: Capture) -> tuple[int, int, int]:
    layer = next(iter(seen.layers.values()))
    return layer.queries.shape[0], layer.keys.shape[0], layer.keys.shape[2]


def _crossover(times: KernelTimes, per_layer: list[dict[str, Any]]) -> int | None:
    """Tokens from which a layer of the mean share of exact keys is faster through the sketch, and not dispatched to dense."""
    found = times.crossover_tokens(_mean([row["exact_fraction"] for row in per_layer]))
    return None if found is None or times.dense_up_to >= LONGEST else max(found, times.dense_up_to)


def _predicted(
    times: KernelTimes, rest: float, per_layer: list[dict[str, Any]], kv_len: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step at kv_len tokens and a dense one, if the layers' shares of exact keys stay as they are."""
    ours = rest + sum(times.step_us(kv_len, row["exact_fraction"]) for row in per_layer) / 1e3
    dense = rest + len(per_layer) * times.dense_us(kv_len) / 1e3
    return (
        {"kv_len": kv_len, "step_ms": ours, "speedup_vs_dense": dense / ours},
        {"kv_len": kv_len, "step_ms": dense, "speedup_vs_dense": 1.0},
    )


def _beside(row: dict[str, Any], measured_ms: float) -> None:
    """The decode's own time beside what was predicted of it; the error is relative to the measurement."""
    row |= {"step_ms_measured": measured_ms, "step_ms_error": row["step_ms"] / measured_ms - 1}


def _timed(ours: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Both steps' times as fields of the policy's row."""
    names = ("step_ms", "step_ms_measured", "step_ms_error")
    fields = {name: ours[name] for name in names} | {name.replace("ms", "ms_dense", 1): dense[name] for name in names}
    measured = dense["step_ms_measured"] / ours["step_ms_measured"]
    return fields | {"speedup_vs_dense": ours["speedup_vs_dense"], "speedup_vs_dense_measured": measured}


def recommend(rows: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """The policy to use, and why: the fewest bytes among those accurate enough, if that is worth having at all."""
    choices = {row["policy"]: (row["output_error"], row["bytes_fraction"]) for row in rows}
    chosen = cheapest(choices, config.wanted_error)
    best = next(row for row in rows if row["policy"] == chosen)
    if best["output_error"] > config.wanted_error:
        why = f"no policy tried has a mean output error of {config.wanted_error:.1%}; this one comes closest"
    elif best["speedup_step_predicted"] < WORTHWHILE_SPEEDUP:
        why = (
            f"at {best['kv_len']:,} tokens the cache is small beside the weights: {best['policy']} would speed a step up "
            f"{best['speedup_step_predicted']:.2f} times at most"
        )
        return {"policy": "dense", "instead_of": best["policy"], "why": why}
    else:
        why = f"the fewest bytes of those with a mean output error of at most {config.wanted_error:.1%}"
    return {"policy": best["policy"], "why": why}


def _keys_needed(seen: Capture, layer: Layer) -> Tensor:
    """Share of the keys that hold SHARES of the mass, [num_q_heads, shares], mean over the measured queries."""
    scores = ask(seen, layer).scores.unflatten(1, (layer.group_size, -1)).flatten(0, 1)  # heads queries keys
    mass = (scores * seen.softmax_scale).softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    allowed = torch.isfinite(scores).sum(-1)
    needed = [((mass < share).sum(-1) + 1).clamp(max=allowed) / allowed for share in SHARES]
    return torch.stack(needed, -1).mean(1)


def _compare(row: dict[str, Any], measured: float) -> None:
    """Put what a decode read beside what was predicted of it."""
    row |= {"bytes_fraction_measured": measured, "prediction_error": row["bytes_fraction"] / measured - 1}


def _layer_row(
    i: int, shown: str, figures: dict[str, Figures], needed: Tensor, memory: float, wanted_error: float
) -> dict[str, Any]:
    row = {"layer": i} | figures[shown].row() | _needed_fields(needed.mean(0))
    choices = {spec: (float(one.error.mean()), _mean(one.bytes_fraction)) for spec, one in figures.items()}
    row |= {"speedup_attention_predicted": 1 / row["bytes_fraction"], "index_memory_fraction": memory}
    return row | {"recommended_policy": cheapest(choices, wanted_error)}


def _head_rows(
    i: int, shown: str, figures: dict[str, Figures], needed: Tensor, wanted_error: float
) -> list[dict[str, Any]]:
    """Errors are a query head's own; bytes are those of its KV head, which serves the whole group."""
    num_q_heads = needed.shape[0]
    errors = {spec: one.error.view(-1, num_q_heads).mean(0) for spec, one in figures.items()}
    read = {spec: torch.stack(one.head_bytes_fraction).double().mean(0) for spec, one in figures.items()}
    group_size = num_q_heads // len(read[shown])
    rows = []
    for head in range(num_q_heads):
        kv_head = head // group_size
        choices = {spec: (float(errors[spec][head]), float(read[spec][kv_head])) for spec in figures}
        row = {"layer": i, "head": head, "kv_head": kv_head, "output_error": choices[shown][0]}
        row |= {"bytes_fraction": choices[shown][1], "speedup_attention_predicted": 1 / choices[shown][1]}
        row |= _needed_fields(needed[head])
        rows.append(row | {"recommended_policy": cheapest(choices, wanted_error)})
    return rows


def cheapest(choices: dict[str, tuple[float, float]], wanted_error: float) -> str:
    """Of specs with their (error, bytes), the one with the fewest bytes that is good enough, else the most accurate."""
    good = [spec for spec, (error, _) in choices.items() if error <= wanted_error]
    if good:
        return min(good, key=lambda spec: choices[spec][1])
    return min(choices, key=lambda spec: choices[spec][0])


def _mean(x: list[float]) -> float:
    return sum(x) / len(x)


def _needed_fields(needed: Tensor) -> dict[str, float]:
    return {
        f"keys_for_{share:.0%}_fraction".replace("%", ""): float(x) for share, x in zip(SHARES, needed, strict=True)
    }
