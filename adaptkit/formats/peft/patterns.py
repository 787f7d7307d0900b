"""rank_pattern and alpha_pattern: per-module numbers, by the first key that matches the end of a module's path."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from ...errors import Mismatch, quoted
from ...select import fullmatches
from ...store.checkpoint import warn

LITERAL = re.compile(r"[\w.]+")
ANCHORED = re.compile(r"\^((?:\w|\\?[.-])+)")


def lookup(patterns: Mapping[str, float] | None, path: str, default: float, *also: str) -> float:
    """The number for a module. The first key in the file's order decides, as in PEFT.    also: its other names."""
    for key, value in (patterns or {}).items():
        if any(_matches(key, name) for name in (path, *also)):
            return value
    return default


def _matches(key: str, path: str) -> bool:
    """Whether a key of a pattern means a module. Raises Corrupt for what is no regular expression."""
    end, whole = _plain(key)
    if whole:
        return path == whole
    if end:
        return path == key or path.endswith(end)
    return bool(fullmatches(rf"(?:.*\.)?(?:{key})", [path]))


@lru_cache(maxsize=1 << 14)
def _plain(key: str) -> tuple[str, str]:
    """The end or the whole of a path that a key is, "" where it is neither: nearly all are, and a thousand are usual.

    Their dots can only mean dots.
    """
    if LITERAL.fullmatch(key):
        return f".{key}", ""
    return "", found[1].replace("\\", "") if (found := ANCHORED.fullmatch(key)) else ""


def unmatched(config: Mapping[str, Any], paths: Collection[str]) -> None:
    """Warn of a key that names no adapted module; raise Mismatch for a pattern that matches none.

    A name may be left over from a module that was not saved. A pattern that hits nothing was meant to hit something,
    and what it was meant for would get another scale.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {}:
            if any(_matches(key, path) for path in paths):
                continue
            if not LITERAL.fullmatch(key):
                raise Mismatch(
                    f"{field}: {quoted(key)!r} matches no adapted module", where="adapter_config.json", hint="remove it"
                )
            warn(f"adapter_config.json: {field} names {quoted(key)}, for which the adapter holds nothing")


def exactly(path: str) -> str:
    """A key of rank_pattern or alpha_pattern that hits one module."""
    return "^" + re.escape(path)
