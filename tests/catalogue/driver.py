"""Runs many command lines in one process: reads requests as JSON, writes one answer as a JSON line for each.

usage: python driver.py REQUESTS ANSWERS
A request is {"id", "argv", "cwd", "plant", "light"}; after a command that was to be light and imported a heavy library
the process stops, since the next could not be judged. What a command tries to reach or import is seen by an audit hook,
not by the command's word: the network is refused and noted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

LIMIT = 20
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
FORBIDDEN = (*NETWORK, "pickle.find_class", "os.system", "os.exec")
PLANTED = ("evil_planted", "modeling_evil")
HEAVY = ("torch", "transformers", "peft", "huggingface_hub")

events: list[str] = []
rang: list[bool] = []


def watch(event: str, arguments: tuple) -> None:
    """The audit hook: note what no input may cause, and refuse the network."""
    if event in FORBIDDEN:
        events.append(f"{event} {arguments!r:.200}")
        if event in NETWORK:
            raise OSError("the network is not there in this test")
    if event == "import" and arguments[0].split(".")[0] in PLANTED:
        events.append(f"import {arguments[0]}")


class TooLong(BaseException):
    """A command did not answer in time; not an Exception, so that few things swallow it."""


def ring(*_: object) -> None:
    rang.append(True)
    raise TooLong


@contextmanager
def captured(number: int) -> Iterator[IO[bytes]]:
    """The file that takes what is written to a file descriptor."""
    kept = os.dup(number)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), number)
        try:
            yield file
        finally:
            os.dup2(kept, number)
            os.close(kept)


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "backslashreplace")


def as_new() -> None:
    """Forget which warnings were shown and which planted module was imported, as a new process would."""
    for name, module in list(sys.modules.items()):
        getattr(module, "__dict__", {}).get("__warningregistry__", {}).clear()
        if name in PLANTED:
            del sys.modules[name]


def call_main(argv: list[str]) -> int | str:
    """The exit code of the command, or what else came out of it."""
    from adaptkit.cli import main

    sys.argv = ["adaptkit", *argv]
    try:
        return main() or 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)


def timed(argv: list[str]) -> int | str:
    """The same within LIMIT seconds; whatever escapes from the command is the answer."""
    try:
        signal.alarm(LIMIT)
        code = call_main(argv)
        signal.alarm(0)
    except BaseException as error:
        signal.alarm(0)
        code = f"raised {error!r}"
    return "too long" if rang else code


def answer(request: dict) -> dict:
    """Run one command and tell what was seen."""
    os.chdir(request["cwd"])
    sys.path[:0] = [request["cwd"]] if request["plant"] else []
    events.clear()
    rang.clear()
    as_new()
    start = time.perf_counter()
    with captured(1) as out, captured(2) as err, warnings.catch_warnings():
        code = timed(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        seconds = time.perf_counter() - start
        seen = {"stdout": text_of(out), "stderr": text_of(err)}
    if request["plant"]:
        sys.path.remove(request["cwd"])
    heavy = [name for name in HEAVY if name in sys.modules]
    return {"id": request["id"], "code": code, "seconds": seconds, "events": list(events), "heavy": heavy, **seen}


def run(requests: str, answers: str) -> None:
    signal.signal(signal.SIGALRM, ring)
    sys.addaudithook(watch)
    with open(requests, encoding="utf-8") as source, open(answers, "w", encoding="utf-8") as sink:
        for request in json.load(source):
            seen = answer(request)
            print(json.dumps(seen), file=sink, flush=True)
            if request["light"] and seen["heavy"]:
                break


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file is not the user's
    run(*sys.argv[1:])
