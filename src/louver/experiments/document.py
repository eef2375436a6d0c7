"""The text a demo reads, the prompt around it, and where in the prompt its parts are.

The default text ships with Python: the topics of its interactive help, in alphabetical order. They differ a little between
Python versions.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.errors import InputFileError

QUESTION = "In one sentence: what should the __getattr__ method either return or raise?"
# As the topics put it; where their lines break and how they quote differs between Python versions.
ANSWER = re.compile(
    r"should either return the \(computed\) attribute value or raise an \S+ exception".replace(" ", r"\s+")
)
_SEPARATOR = "\n\n\n"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, its sections as (title, first character), and where the answer is, if that is known."""

    text: str
    sections: list[tuple[str, int]] = field(default_factory=list)
    answer: tuple[int, int] | None = None  # characters, [start, end)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids [1, num_tokens] and the token positions of the document's parts."""

    ids: Tensor
    document: tuple[int, int]  # [start, end)
    sections: list[tuple[str, int]]
    answer: tuple[int, int] | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.ids.shape[1]


def python_topics(tokenizer: Any, num_tokens: int) -> Document:
    """Python's help topics in alphabetical order, cut after num_tokens tokens."""
    from pydoc_data.topics import topics

    text, sections = "", []
    for title in sorted(topics):
        sections.append((title, len(text)))
        text += topics[title].strip() + _SEPARATOR
        if len(text) > 16 * num_tokens:  # far more than any tokenizer needs
            break
    text = cut(tokenizer, text, num_tokens)
    answer = ANSWER.search(text)
    return Document(
        text=text,
        sections=[(title, at) for title, at in sections if at < len(text)],
        answer=answer.span() if answer else None,
    )


def read_document(path: Path, tokenizer: Any, num_tokens: int | None = None) -> Document:
    """Read a text file, cut after num_tokens tokens if given.

    Raises:
        InputFileError: there is no such file, or it is not text, or empty.
    """
    text = read_text(path)
    return Document(text=text if num_tokens is None else cut(tokenizer, text, num_tokens))


def read_text(path: Path) -> str:
    """Read a UTF-8 file that is not empty, or raise an InputFileError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputFileError(f"{path}: is a folder; wanted a text file") from None
    except UnicodeDecodeError:
        raise InputFileError(f"{path}: not a text file in UTF-8") from None
    if not text.strip():
        raise InputFileError(f"{path}: the file is empty")
    return text


def cut(tokenizer: Any, text: str, num_tokens: int) -> str:
    """The beginning of text that takes num_tokens tokens (all of it if it takes fewer)."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= num_tokens else tokenizer.decode(ids[:num_tokens]).rstrip("\ufffd")


def build_prompt(tokenizer: Any, document: Document, question: str | None, chat: bool) -> Prompt:
    """Put the question under the document, inside the chat template if chat is set.

    Raises:
        InputFileError: chat is set and the model has no chat template.
    """
    content = document.text if question is None else f"{document.text.rstrip()}{_SEPARATOR}{question}"
    text = content
    if chat:
        if not tokenizer.chat_template:
            raise InputFileError("the model has no chat template; run it without --chat")
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    at = max(0, text.find(document.text.strip()[:200]) - (len(document.text) - len(document.text.lstrip())))
    starts = [start for start, end in encoded["offset_mapping"]] if tokenizer.is_fast else []

    def token(character: int) -> int:
        return max(0, bisect_right(starts, at + character) - 1)

    end = len(document.text.rstrip())
    return Prompt(
        ids=torch.tensor([encoded["input_ids"]]),
        document=(token(0), token(end)) if starts else (0, len(encoded["input_ids"])),
        sections=[(title, token(character)) for title, character in document.sections] if starts else [],
        answer=(token(document.answer[0]), token(document.answer[1]) + 1) if starts and document.answer else None,
    )
