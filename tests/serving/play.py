"""One kind of engine playing every scenario, in a process of its own: vLLM does not start a third engine in one process.

Usage: python play.py SETTINGS OUT, both JSON; SETTINGS is null for stock vLLM.
"""

import dataclasses
import json
import sys
from pathlib import Path

from serving.engine import engine
from serving.scenarios import SPECULATIVE, TIGHT, metric, play_speculative, play_tight


def play(settings: dict | None) -> dict:
    """What the engines said, what they did, and what the worker counted."""
    from louver.experiments.demo_model import demo_folder
    from louver.integrations.vllm.totals import totals

    folder = demo_folder()
    with engine(folder, settings, **TIGHT) as llm:
        out = {"tokens": play_tight(llm)}
        out["preemptions"] = metric(llm, "vllm:num_preemptions")
        out["encodings_per_page"] = totals.num_encoded_pages / max(1, totals.num_pages)
        out["prefix_hits"] = metric(llm, "vllm:prefix_cache_hits")
    with engine(folder, settings, **SPECULATIVE) as llm:
        out["tokens"] |= play_speculative(llm)
        out["drafted"] = metric(llm, "vllm:spec_decode_num_draft_tokens")
        out["accepted"] = metric(llm, "vllm:spec_decode_num_accepted_tokens")
    counted = {f.name: getattr(totals, f.name) for f in dataclasses.fields(totals) if f.name.startswith("num_")}
    unread = None if totals.stats is None else totals.stats.fraction("unread")
    return out | counted | {"unread_fraction": unread}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(play(json.loads(sys.argv[1]))))
