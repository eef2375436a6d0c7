"""Lists on the command line: separated by commas, every item read by the same function."""

from collections.abc import Callable
from typing import TypeVar

from louver.errors import InputFileError

T = TypeVar("T")


def split_list(option: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """The items of ``text``; raises an InputFileError that names the option for one that can't be read."""
    items = []
    for part in (p.strip() for p in text.split(",")):
        try:
            items.append(read(part))
        except ValueError:
            raise InputFileError(f"{option}: {part!r} in {text!r} can't be read") from None
    return tuple(items)
