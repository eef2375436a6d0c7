"""What a serving engine does to a KV cache, as calls on an engine. Each returns its tokens; ``facts`` says that it happened."""

from collections.abc import Callable
from pathlib import Path

WORDS = (Path(__file__).parents[2] / "LICENSE").read_text().split()
TOKENS = list[list[int]]


def text(begin: int, count: int) -> str:
    """Some words of a long document."""
    return " ".join(WORDS[begin : begin + count])


def decode(llm, prompts: list[str], num_tokens: int = 24) -> TOKENS:
    """Greedy continuations."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]


def metric(llm, name: str) -> float:
    """A counter of the engine's."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def chunked_prefill(llm) -> TOKENS:
    """A prompt of several budgets."""
    return decode(llm, [text(0, 640)])


def prefix_hits(llm) -> TOKENS:
    """Prompts that begin as the one before."""
    return decode(llm, [text(0, 640) + " What follows is a summary.", text(0, 600)])


def mixed_batches(llm) -> TOKENS:
    """More requests than seats, of different lengths: some decode while others are still being read."""
    return decode(llm, [text(200 * i, 90 + 130 * (i % 3)) for i in range(6)])


def block_reuse(llm) -> TOKENS:
    """Other requests take the pages of those before; then the first comes back."""
    return decode(llm, [text(700, 650)]) + decode(llm, [text(300, 620)]) + decode(llm, [text(0, 640)])


def preemption(llm) -> TOKENS:
    """More tokens than pages: requests are thrown out while they decode, and start again."""
    return decode(llm, [text(150 * i, 380) for i in range(4)], num_tokens=72)


SCENARIOS: tuple[Callable, ...] = (chunked_prefill, prefix_hits, mixed_batches, block_reuse, preemption)

# Too few pages for what four requests of preemption grow to; a budget that cuts prompts in pieces.
TIGHT = {"max_num_seqs": 4, "max_num_batched_tokens": 192, "num_gpu_blocks_override": 19}
SPECULATIVE = {
    "max_num_seqs": 4,
    "speculative_config": {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2,
    },
}  # fmt: skip


def repetitive(llm) -> TOKENS:
    """Text that a lookup in the prompt guesses, sometimes wrongly."""
    return decode(llm, [text(0, 330) + " " + text(0, 200), text(500, 450) + " " + text(500, 40)], num_tokens=48)


def play_tight(llm) -> dict[str, TOKENS]:
    """Every scenario that one engine can play, one after another on the same pages."""
    return {scenario.__name__: scenario(llm) for scenario in SCENARIOS}


def play_speculative(llm) -> dict[str, TOKENS]:
    """The scenario that needs an engine with drafts."""
    return {"speculation": repetitive(llm)}
