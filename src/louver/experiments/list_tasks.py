"""Short lists to add up or to look something up in, with the position of every token that matters.

Each task shows a solved example or more, then asks. Which tasks a model can do at all depends on the model; the false-negatives
experiment measures it with nothing hidden and says so.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from louver.errors import InputFileError
from louver.experiments.words import Vocabulary

_MOST_DRAWS = 50  # per sample wanted, to find samples of equal length


@dataclass(frozen=True, kw_only=True)
class ListSample:
    """A prompt, its answer, and positions in the prompt's last question."""

    prompt: list[int]
    answer: list[int]
    relevant: list[int]  # per token of the answer, the position of the token it is read from
    separators: list[int]  # commas, plus signs, line ends
    others: list[int]  # tokens of the other items


@dataclass
class _Builder:
    """Puts a prompt together piece by piece and notes where each became tokens."""

    vocabulary: Vocabulary
    tokens: list[int] = field(default_factory=list)
    places: dict[str, list[int]] = field(default_factory=dict)

    def add(self, text: str, role: str = "") -> None:
        new = self.vocabulary.tokens(text)
        self.places.setdefault(role, []).extend(range(len(self.tokens), len(self.tokens) + len(new)))
        self.tokens += new


def _sum(b: _Builder, rng: random.Random, ask: bool) -> list[int]:
    """``3 + 4 =`` and then 7; the numbers are small enough for a small model."""
    numbers = [rng.randint(1, 4) for _ in range(2)]
    chosen = rng.randrange(len(numbers))
    for i, number in enumerate(numbers):
        if i:
            b.add(" +", "separator" if ask else "")
        role = "relevant" if i == chosen else "other"
        b.add(f" {number}" if i else f"{number}", role if ask else "")
    b.add(" =")
    answer = b.vocabulary.tokens(f" {sum(numbers)}")
    if not ask:
        b.tokens += answer
        b.add("\n")
    return answer


def _pairs(values: Callable[[Vocabulary, random.Random, int], list[str]], count: int) -> Callable[..., list[int]]:
    def build(b: _Builder, rng: random.Random, ask: bool) -> list[int]:
        """``Alice: river, Bob: stone`` ... ``Answer: Alice:`` and then river."""
        b.add("List:")
        names = rng.sample(b.vocabulary.names, count)
        found = values(b.vocabulary, rng, count)
        chosen = rng.randrange(count)
        for i, (name, value) in enumerate(zip(names, found, strict=True)):
            b.add(f" {name}", "other" if ask and i != chosen else "")
            b.add(":")
            b.add(f" {value}", ("relevant" if i == chosen else "other") if ask else "")
            if i < count - 1:
                b.add(",", "separator" if ask else "")
        b.add("\n", "separator" if ask else "")
        b.add(f"Answer: {names[chosen]}:")
        answer = b.vocabulary.tokens(f" {found[chosen]}")
        if not ask:
            b.tokens += answer
            b.add("\n\n")
        return answer

    return build


def _items(count: int) -> Callable[..., list[int]]:
    def build(b: _Builder, rng: random.Random, ask: bool) -> list[int]:
        """A numbered list, then ``3.`` again, and the third item."""
        b.add("List:\n")
        words = rng.sample(b.vocabulary.words, count)
        chosen = rng.randrange(count)
        for i, word in enumerate(words):
            b.add(f"{i + 1}.")
            b.add(f" {word}", ("relevant" if i == chosen else "other") if ask else "")
            b.add("\n", "separator" if ask else "")
        b.add(f"Answer:\n{chosen + 1}.")
        answer = b.vocabulary.tokens(f" {words[chosen]}")
        if not ask:
            b.tokens += answer
            b.add("\n\n")
        return answer

    return build


def _words(vocabulary: Vocabulary, rng: random.Random, count: int) -> list[str]:
    return rng.sample(vocabulary.words, count)


def _numbers(vocabulary: Vocabulary, rng: random.Random, count: int) -> list[str]:
    return [str(rng.randint(100, 999)) for _ in range(count)]


# name -> (how a question is built, solved examples before it)
LIST_TASKS: dict[str, tuple[Callable[..., list[int]], int]] = {
    "sum": (_sum, 6),
    "lookup": (_items(6), 2),
    "recall": (_pairs(_words, 8), 1),
    "recall-number": (_pairs(_numbers, 8), 1),
}


def list_samples(task: str, vocabulary: Vocabulary, num_samples: int, seed: int) -> list[ListSample]:
    """Samples of a task, all equally long; the same seed gives the same samples with the same tokenizer.

    Raises:
        InputFileError: there is no such task, or the tokenizer gives almost every sample another length.
    """
    if task not in LIST_TASKS:
        raise InputFileError(f"task {task!r} is unknown; wanted one of {', '.join(LIST_TASKS)}")
    build, shots = LIST_TASKS[task]
    rng = random.Random(f"{task}-{seed}")
    by_shape: dict[tuple[int, int], list[ListSample]] = {}
    for _ in range(_MOST_DRAWS * num_samples):
        sample = _draw(build, shots, vocabulary, rng)
        alike = by_shape.setdefault((len(sample.prompt), len(sample.answer)), [])
        alike.append(sample)
        if len(alike) == num_samples:
            return alike
    raise InputFileError(f"task {task!r}: this tokenizer makes too few samples of equal length")


def _draw(build: Callable[..., list[int]], shots: int, vocabulary: Vocabulary, rng: random.Random) -> ListSample:
    b = _Builder(vocabulary, tokens=vocabulary.start())
    for _ in range(shots):
        build(b, rng, False)
    b.places = {}
    answer = build(b, rng, True)
    relevant = b.places["relevant"]
    # A copied answer is read token by token from where it stands, a sum from the last token of its number at every step.
    if build is _sum or len(relevant) != len(answer):
        relevant = [relevant[-1]] * len(answer)
    return ListSample(
        prompt=b.tokens,
        answer=answer,
        relevant=relevant,
        separators=b.places.get("separator", []),
        others=b.places.get("other", []),
    )
