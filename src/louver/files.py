"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from louver.errors import InputFileError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in place of path: written beside it, forced to the disk, and renamed when the block ends well.

    Whenever the process or the machine stops, path holds what it held before or all of the new content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:  # it would name a file that nobody asked for
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(target.parent)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raise an InputFileError for a file that can't be written, before the work whose result it is to hold. None is no file.

    Nothing is made. A place that only turns out to be full, or taken, when the file is written is not foreseen.
    """
    for path in paths:
        if path is None:
            continue
        if Path(path).is_dir():
            raise InputFileError(f"{path}: is a folder; wanted the name of a file")
        folder = next(p for p in Path(path).absolute().parents if p.exists())
        if not folder.is_dir():
            raise InputFileError(f"{path}: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputFileError(f"{path}: no permission to write in {folder}")


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only when the folder is.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
