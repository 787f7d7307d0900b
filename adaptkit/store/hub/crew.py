"""Threads that fetch. They end with the process whatever they wait for, so that Ctrl-C is answered at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

PATIENCE = 1.5  # seconds to wait for threads that were told to stop


class Stopped(BaseException):
    """The run ends: a download in another thread ends with it, and is gone on with another time."""


class Crew:
    """At most `size` jobs at once. A job that fetches calls `check` now and then."""

    def __init__(self, size: int):
        self.places, self.stopping, self.threads = threading.Semaphore(size), threading.Event(), []

    def begin(self, job: Callable[..., Any], *args: Any) -> Future:
        """Start a job as soon as there is a place."""
        future: Future = Future()
        thread = threading.Thread(target=self._run, args=(future, job, args), daemon=True)
        self.threads.append(thread)
        thread.start()
        return future

    def _run(self, future: Future, job: Callable[..., Any], args: tuple) -> None:
        with self.places:
            try:
                self.check()
                future.set_result(job(*args))
            except BaseException as e:
                future.set_exception(e)

    def check(self) -> None:
        """Raises Stopped when the run has ended."""
        if self.stopping.is_set():
            raise Stopped

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the jobs end; those that hang in the network are left to themselves."""
        self.stopping.set()
        end = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
