"""rank_pattern and alpha_pattern: per-module numbers, by the first key that matches the end of a module's path."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import Mismatch, quoted
from ...select import fullmatches
from ...store.checkpoint import warn

LITERAL = re.compile(r"[\w.]+")


def lookup(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The number for a module. The first key in the file's order decides, as in PEFT."""
    for key, value in (patterns or {}).items():
        if _matches(key, path):
            return value
    return default


def _matches(key: str, path: str) -> bool:
    if LITERAL.fullmatch(key):  # nearly all keys; their dots can only mean dots
        return path == key or path.endswith("." + key)
    return bool(fullmatches(rf"(?:.*\.)?(?:{key})", [path]))


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
