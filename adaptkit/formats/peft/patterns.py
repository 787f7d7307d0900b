"""rank_pattern and alpha_pattern: per-module numbers, by the first key that matches the end of a module's path."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...select import fullmatches

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
