"""targets: which modules of a model a selection hits."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import Corrupt, Usage
from ..select import Select, fullmatches, parse_layers
from ..store.hub.ghost import glance
from .inputs import opened

PLAIN = re.compile(r"[\w.\-]+(?:,[\w.\-]+)*")


@dataclass
class Target:
    """A module that is hit. shape, dtype: of its weight as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def targets(
    model: str | Path,
    *,
    target_modules: str | Collection[str] | None = None,
    layers: str | Collection[int] | None = None,
    layers_pattern: str | None = None,
    exclude_modules: str | Collection[str] | None = None,
) -> list[Target]:
    """Show which modules of a model a selection hits.

    model: a folder or file, or a Hub id, of which only the headers are fetched.
    target_modules: a regular expression for whole names, or names ("q_proj,v_proj"); all modules when left out.
    layers: "0-3,7", or numbers.   layers_pattern: what stands before the layer's number.   exclude_modules: as target_modules.

    Raises Mismatch with the endings that occur when nothing is hit.
    """
    with glance(model, "model") as folder:
        entries = opened(folder).entries
    weights = {n.removesuffix(".weight"): e for n, e in entries.items() if len(e.shape) > 1 or n.endswith(".weight")}
    rule = rule_of(target_modules) if target_modules is not None else ".*"
    chosen = Select(
        pattern=rule if isinstance(rule, str) else None,
        names=None if isinstance(rule, str) else rule,
        layers=parse_layers(layers) if isinstance(layers, str) else layers,
        layers_pattern=layers_pattern,
        exclude=rule_of(exclude_modules, "--exclude-modules") if exclude_modules is not None else None,
    )
    return [Target(n, weights[n].shape, weights[n].dtype) for n in chosen(weights)]


def rule_of(text: str | Collection[str], where: str = "--target-modules") -> str | list[str]:
    """Names when it reads like names; a plain name as a whole-name pattern would hit nothing.

    Raises Usage for what is no regular expression.
    """
    if not isinstance(text, str):
        return list(text)
    if PLAIN.fullmatch(text):
        return text.split(",")
    try:
        fullmatches(text, ())
    except Corrupt as e:
        raise Usage(e.message, where=where) from None
    return text
