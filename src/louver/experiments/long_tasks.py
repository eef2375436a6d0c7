"""Long-context tasks in the style of RULER, made offline from a seed: every sample of a task and length is exactly that many tokens long.

Source of the kinds of task: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, arXiv 2404.06654. Needles
are sentences put at random depths into Python's help topics; the question is the needle's own beginning, so that a model that only
continues text can answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.document import python_topics, read_text
from louver.experiments.words import Vocabulary

SHORTEST_TOKENS = 256
_HAYSTACK_TOKENS = 150_000


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A task before it has a length: sentences to hide in a text, in this order, the question after it, and the answer."""

    needles: list[str]
    question: str
    answer: str
    filler: list[str] | None = None  # instead of the text: words to repeat at random


@dataclass(frozen=True, kw_only=True)
class LongBatch:
    """Samples of one task and length."""

    prompts: Tensor  # int64 [samples, kv_len]
    answers: Tensor  # int64 [samples, steps], filled up at the end
    counts: Tensor  # bool, the same: False where an answer was filled up


def single_needle(v: Vocabulary, rng: random.Random) -> Draft:
    """One sentence in a long text."""
    name, word = rng.choice(v.names), rng.choice(v.words)
    return Draft(needles=[_magic(name, word)], question=_magic(name), answer=f" {word}")


def multi_key(v: Vocabulary, rng: random.Random) -> Draft:
    """Eight such sentences; one is asked for."""
    names, words = rng.sample(v.names, 8), rng.sample(v.words, 8)
    chosen = rng.randrange(8)
    needles = [_magic(n, w) for n, w in zip(names, words, strict=True)]
    return Draft(needles=needles, question=_magic(names[chosen]), answer=f" {words[chosen]}")


def multi_needle(v: Vocabulary, rng: random.Random) -> Draft:
    """Three numbered facts, all asked for."""
    words = rng.sample(v.words, 3)
    needles = [f"\n\nMagic word {i + 1}: {word}\n\n" for i, word in enumerate(words)]
    return Draft(
        needles=needles,
        question="\n\nMagic word 1:",
        answer=f" {words[0]}\n\nMagic word 2: {words[1]}\n\nMagic word 3: {words[2]}",
    )


def number_needle(v: Vocabulary, rng: random.Random) -> Draft:
    """One sentence that holds a number of five digits."""
    name, number = rng.choice(v.names), rng.randint(10_000, 99_999)
    return Draft(
        needles=[f"\n\nThe number of {name} is {number}.\n\n"],
        question=f"\n\nThe number of {name} is",
        answer=f" {number}",
    )


def tracking(v: Vocabulary, rng: random.Random) -> Draft:
    """A chain of assignments; the last variable's value is the first one's."""
    names, word = rng.sample(v.names, 3), rng.choice(v.words)
    a, b, c = names
    needles = [f"\n\n{a} = {word}\n\n", f"\n\n{b} = {a}\n\n", f"\n\n{c} = {b}\n\n"]
    return Draft(needles=needles, question=f"\n\n{a} = {word}, so {b} = {word}, so {c} =", answer=f" {word}")


def aggregation(v: Vocabulary, rng: random.Random) -> Draft:
    """A long list of words, of which one comes up far more often than any other."""
    words = rng.sample(v.words, 11)
    filler = words[1:] + words[:1] * 10
    return Draft(needles=[], question="\n\nThe most common word is:", answer=f" {words[0]}", filler=filler)


def documents(v: Vocabulary, rng: random.Random) -> Draft:
    """Short biographies in the text; a question about one of them."""
    names, cities, words = rng.sample(v.names, 6), [rng.choice(v.cities) for _ in range(6)], rng.sample(v.words, 6)
    needles = [
        f"\n\n{n} works with {w} and lives in the city of {c}.\n\n"
        for n, c, w in zip(names, cities, words, strict=True)
    ]
    i = rng.randrange(6)
    question = f"\n\nQuestion: In which city does {names[i]} live?\nAnswer: {names[i]} lives in the city of"
    return Draft(needles=needles, question=question, answer=f" {cities[i]}")


def quote(v: Vocabulary, rng: random.Random) -> Draft:
    """A line of random words, to be continued from its first four."""
    words = " ".join(rng.choice(v.words) for _ in range(10)).split()
    line = " ".join(words)
    return Draft(
        needles=[f"\n\nList: {line}\n\n"],
        question=f"\n\nList: {' '.join(words[:4])}",
        answer=" " + " ".join(words[4:9]),
    )


LONG_TASKS: dict[str, Callable[[Vocabulary, random.Random], Draft]] = {
    "single-needle": single_needle,
    "number-needle": number_needle,
    "multi-needle": multi_needle,
    "multi-key": multi_key,
    "documents": documents,
    "quote": quote,
    "tracking": tracking,
    "aggregation": aggregation,
}


def haystack(vocabulary: Vocabulary, num_tokens: int = _HAYSTACK_TOKENS) -> list[int]:
    """The tokens of the text that needles are hidden in."""
    return vocabulary.tokens(python_topics(vocabulary.tokenizer, num_tokens).text)


def long_batch(
    task: str, vocabulary: Vocabulary, text: list[int], kv_len: int, num_samples: int, seed: int
) -> LongBatch:
    """num_samples samples of kv_len tokens each; ``text`` is haystack(vocabulary).

    Raises:
        InputFileError: there is no such task, or no room for it in so few tokens.
    """
    if task not in LONG_TASKS:
        raise InputFileError(f"task {task!r} is unknown; wanted one of {', '.join(LONG_TASKS)}")
    rng = random.Random(f"{task}-{kv_len}-{seed}")
    prompts, answers = [], []
    for _ in range(num_samples):
        draft = LONG_TASKS[task](vocabulary, rng)
        prompts.append(_laid_out(draft, vocabulary, text, kv_len, rng))
        answers.append(vocabulary.tokens(draft.answer))
    steps = max(len(answer) for answer in answers)
    counts = torch.tensor([[i < len(answer) for i in range(steps)] for answer in answers])
    filled = [answer + answer[-1:] * (steps - len(answer)) for answer in answers]
    return LongBatch(prompts=torch.tensor(prompts), answers=torch.tensor(filled), counts=counts)


def _laid_out(draft: Draft, v: Vocabulary, text: list[int], kv_len: int, rng: random.Random) -> list[int]:
    """The prompt: needles at random depths of as much text as there is room for, the question at the end."""
    start, needles, question = v.start(), [v.tokens(n) for n in draft.needles], v.tokens(draft.question)
    room = kv_len - len(start) - sum(map(len, needles)) - len(question)
    if kv_len < SHORTEST_TOKENS or room < len(needles) + 1:
        raise InputFileError(f"kv_len={kv_len}: too few tokens for this task; wanted {SHORTEST_TOKENS} or more")
    if draft.filler is None:
        at = rng.randrange(max(1, len(text) - room))
        filler = (text[at:] + text * (1 + room // len(text)))[:room]
    else:
        filler = []
        while len(filler) < room:
            filler += v.tokens(f" {rng.choice(draft.filler)}")
        filler = filler[:room]
    depths = sorted(rng.sample(range(room + 1), len(needles)))
    prompt, last = list(start), 0
    for depth, needle in zip(depths, needles, strict=True):
        prompt += filler[last:depth] + needle
        last = depth
    return prompt + filler[last:] + question


def _magic(name: str, word: str | None = None) -> str:
    return f"\n\nThe magic word of {name} is" + (f" {word}.\n\n" if word else "")


def text_batch(
    vocabulary: Any, text: list[int], kv_len: int, num_steps: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Stretches of the text, evenly spread over it: [samples, kv_len] to read and [samples, num_steps] that follow."""
    start = vocabulary.start()
    length = kv_len - len(start) + num_steps
    if len(text) < length:
        raise InputFileError(f"the text has {len(text)} tokens; wanted at least {length}")
    places = torch.linspace(0, len(text) - length, num_samples).long().tolist()
    rows = torch.tensor([start + text[at : at + length] for at in places])
    return rows[:, :kv_len], rows[:, kv_len:]


def stretches(
    tokenizer: Any, prompt_file: Path | None, kv_len: int, num_steps: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """``text_batch`` of a text file, or of Python's help topics.

    Raises:
        InputFileError: the text isn't there, or too short.
    """
    vocabulary = Vocabulary(tokenizer)
    text = haystack(vocabulary) if prompt_file is None else vocabulary.tokens(read_text(prompt_file))
    return text_batch(vocabulary, text, kv_len, num_steps, num_samples)
