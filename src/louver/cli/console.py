"""The terminal: one console for results, one for errors, and how an error looks (one red line, exit code 2)."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from louver.errors import LouverError

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def fail(message: str) -> NoReturn:
    """Print one red line on stderr and leave with exit code 2."""
    line = " ".join(message.split())
    errors.print(Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True)
    raise typer.Exit(2)


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that what a user can cause is told in one line. Bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LouverError as error:
            fail(str(error))
        except OSError as error:  # an output folder that cannot be made, a disk that is full
            if error.filename is None:
                raise
            fail(f"{error.filename2 or error.filename}: {error.strerror}")

    return wrapped


class Stages:
    """Progress bars on stderr, one per stage, for anything that takes over a second; gone when done.

    Call it as ``stages(stage, done, total)``; use it as a context manager.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=errors,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._running = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that a stage is at done of total."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)

    def stop(self) -> None:
        """Clear the bars; harmless when they are gone already."""
        if self._running:  # where stderr is no terminal, every stop would print a newline
            self._running = False
            self._bars.stop()

    def __enter__(self) -> "Stages":
        self._running = True
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
