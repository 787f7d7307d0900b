"""A progress bar in bytes on stderr, when somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_reached: tuple[int, int] | None = None


@contextmanager
def bar(text: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (bytes, of bytes); draws a bar on a terminal, and nothing elsewhere."""
    global _reached
    _reached = None
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield _note
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ..store.hub import talk

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown_bar:
        task = shown_bar.add_task(text, total=None)

        def update(done: int, total: int) -> None:
            _note(done, total)
            shown_bar.update(task, completed=done, total=total)

        update.label = lambda words: shown_bar.update(task, description=words or text)  # what is going on now
        talk.on_wait.append(update.label)
        try:
            yield update
        finally:
            talk.on_wait.remove(update.label)


def _note(done: int, total: int) -> None:
    global _reached
    _reached = (done, total)


def reached() -> str:
    """How far the work had come, for the line of an interrupted run."""
    return f" after {_reached[0] / max(_reached[1], 1):.0%}" if _reached else ""
