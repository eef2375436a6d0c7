"""What a long run has measured so far, part by part: an aborted run loses the part it was at, and a repeated one goes on from there.

One JSON line per part, forced to the disk as it comes. A part's key says everything that its result depends on, the machine and the
versions included, so what another machine or another setting measured is never taken for this one's.
"""

import json
import os
from pathlib import Path
from typing import Any

from louver.experiments.rows import machine

SUFFIX = ".partial"


class Journal:
    """Results by key; in memory alone without a path.

    Args:
        path: read now if it is there, written with every part. Its folder is made where needed.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        here = machine(None, "")
        self._origin = {name: here[name] for name in ("device", "versions")}
        self._found: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    @classmethod
    def beside(cls, rows: Path | None) -> "Journal":
        """The one of a file of rows: the same name with ``.partial`` behind it."""
        return cls(None if rows is None else rows.with_name(rows.name + SUFFIX))

    def get(self, **key: Any) -> Any | None:
        """What was put under this key, as JSON gives it back; None if nothing was."""
        return self._found.get(self._line(key))

    def put(self, result: Any, **key: Any) -> None:
        """Keep a result that JSON can hold."""
        line = self._line(key)
        self._found[line] = result
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([line, result]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Everything is measured and stored elsewhere: remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _line(self, key: dict[str, Any]) -> str:
        return json.dumps({**key, "origin": self._origin}, sort_keys=True, default=str)

    def _read(self, line: str) -> None:
        try:
            key, result = json.loads(line)
        except ValueError:  # the line at which a run was stopped
            return
        self._found[key] = result
