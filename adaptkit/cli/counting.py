"""A progress bar in sites on stderr, when somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counter(text: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (sites, of sites); draws a bar on a terminal, and nothing elsewhere."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(text, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)
