"""The journal of a run: which files are finished. One line each:  crc32 in hex, a space, JSON, a newline.

Only the good prefix counts: after the first line that is torn or damaged nothing is believed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from adaptkit.errors import AdaptKitError
from adaptkit.store.disk import create, sync_folder, write_all
from adaptkit.store.safepaths import plain, read_small

NAME = ".adaptkit.journal"
FRESH = NAME + ".tmp"


def framed(fact: dict) -> bytes:
    """One journal line."""
    text = json.dumps(fact, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def good_prefix(data: bytes) -> tuple[list[dict], int]:
    """The facts of all lines before the first bad one, and how many bytes they take."""
    facts, good = [], 0
    while (end := data.find(b"\n", good)) >= 0:
        fact = _fact(data[good:end])
        if fact is None:
            break
        facts.append(fact)
        good = end + 1
    return facts, good


def _fact(line: bytes) -> dict | None:
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    try:
        fact = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fact if isinstance(fact, dict) else None


def records(facts: object) -> dict[str, dict]:
    """File records by name, those that do not read like one left out; of two with one name the later counts."""
    return {fact["name"]: fact for fact in facts if _is_record(fact)} if isinstance(facts, list) else {}


def _is_record(fact: object) -> bool:
    if not isinstance(fact, dict) or type(fact.get("size")) is not int or fact["size"] < 0:
        return False
    try:
        return plain(fact.get("name")) == fact["name"]
    except AdaptKitError:
        return False


def read(folder: Path) -> tuple[str | None, dict[str, dict], int]:
    """The plan the journal was begun for (None if even that is lost), its records, and the bytes that do not count."""
    data = read_small(folder / NAME)
    facts, good = good_prefix(data)
    plan = facts[0].get("plan") if facts else None
    known = isinstance(plan, str)
    return plan if known else None, records(facts[1:]) if known else {}, len(data) - good


class Journal:
    """An open journal. It is written anew when a run begins, so damage does not stay in it."""

    def __init__(self, folder: Path, plan: str, done: Iterable[dict] = ()):
        (folder / FRESH).unlink(missing_ok=True)
        self.fd = create(folder / FRESH)
        self.end = 0
        try:
            self.append({"plan": plan}, *done)
            os.rename(folder / FRESH, folder / NAME)
            sync_folder(folder)
        except BaseException:
            self.close()
            raise

    def append(self, *facts: dict) -> None:
        """Add lines that survive a power cut. A line that failed is overwritten by the next."""
        data = b"".join(map(framed, facts))
        write_all(self.fd, data, self.end)
        os.fsync(self.fd)
        self.end += len(data)

    def close(self) -> None:
        os.close(self.fd)
