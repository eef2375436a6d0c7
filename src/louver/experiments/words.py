"""Words and names that tasks are made of, and how they become tokens.

A task is put together from pieces, each turned into tokens on its own, so that it is known which tokens a piece became.
"""

from typing import Any

WORDS = (
    "apple river stone cloud horse table green music paper tiger lemon chair ocean bread glass knife piano tower eagle candle "
    "forest winter silver garden bridge window orange pepper rocket violin hammer basket carpet dragon engine feather guitar "
    "helmet island jacket kitchen ladder market needle office pencil quartz ribbon saddle ticket umbrella valley wagon yellow"
)
NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Jack Kate Leo Mary Nick Paul Rose Sam Tom Anna Ben Clara Peter Lucy"
)
CITIES = "Paris London Berlin Rome Madrid Vienna Tokyo Boston Dublin Moscow Cairo Sydney Delhi Chicago Seattle Austin"


class Vocabulary:
    """A tokenizer, and the words that are one token in it when a blank stands before them (all of them, where too few are)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.words, self.names, self.cities = (self._short(words) for words in (WORDS, NAMES, CITIES))

    def tokens(self, text: str) -> list[int]:
        """The tokens of a piece, without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def start(self) -> list[int]:
        """What the tokenizer puts before a text."""
        with_start = self.tokenizer("a", verbose=False)["input_ids"]
        return (
            with_start[: max(0, len(with_start) - len(self.tokens("a")))] if with_start[-1:] == self.tokens("a") else []
        )

    def _short(self, text: str) -> list[str]:
        words = text.split()
        short = [word for word in words if len(self.tokens(" " + word)) == 1]
        return short if len(short) >= 12 else words
