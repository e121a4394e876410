"""Progress on the command line."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Bars:
    """Progress bars with counts and the time left; where there is no terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """See `nnopt.search.run.Watcher`."""
        self._task = self._progress.add_task(name, total=total, note="")
        # Told by an update, the bar of a phase that was complete before stops its clock.
        self._progress.update(self._task, completed=done)
        self._next_line = 0.0

    def advance(self, note: str = "") -> None:
        """See `nnopt.search.run.Watcher`."""
        assert self._task is not None
        self._progress.update(self._task, advance=1, note=note)
        task = self._progress.tasks[self._task]
        now = time.monotonic()
        if not self._console.is_terminal and (now >= self._next_line or task.finished):
            left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
            line = f"{task.description}: {task.completed:.0f}/{task.total:.0f}{left}{note and f', {note}'}"
            self._console.print(line, soft_wrap=True, highlight=False)
            self._next_line = now + _SECONDS_BETWEEN_LINES
