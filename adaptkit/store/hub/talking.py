"""A conversation with the Hub: its failures become sentences, and the client's own bars and log lines stay down."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .ids import Ref
from .words import explained


@contextmanager
def talking(ref: Ref | str, token: str | bool | None = None) -> Iterator[None]:
    """Turn what goes wrong at the Hub into a sentence about `ref`; keep the client's own bars and log lines down."""
    try:
        with _hushed():
            yield
    except Exception as e:
        raise explained(e, ref if isinstance(ref, Ref) else Ref(ref), token) from e


_mutex = threading.Lock()
_quiet: list[Callable[[], None]] = []  # one for each who is talking; the first holds what the last puts back


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the client's progress bars and log lines, in all threads that talk."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with _mutex:
        if not _quiet:
            log, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
            level = log.level
            _quiet.append(lambda: (log.setLevel(level), enable_progress_bars() if shown else None))
            log.setLevel(logging.CRITICAL)
            if shown:
                disable_progress_bars()
        _quiet.append(lambda: None)
    try:
        yield
    finally:
        with _mutex:
            _quiet.pop()
            if len(_quiet) == 1:
                _quiet.pop()()
