"""How far the updates of adapters overlap, site by site and in all, from their factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter, Site
from ..algebra.overlap import Update, angles, inner, shared
from ..errors import AdaptKitError, Mismatch, quoted
from ..store.arrays import load
from ..store.hub import called, origin


@dataclass
class SiteOverlap:
    """Two updates of one module.

    cosine: of the angle between them as vectors, None when one is zero.   norms: |D|, Frobenius.
    columns, rows: principal angles between the spaces that they write to and read from, degrees, smallest first.
    shared_columns, shared_rows: the share of the smaller space that lies in the other, 0 to 1.
    """

    name: str
    cosine: float | None
    norms: tuple[float, float]
    columns: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    shared_columns: float = 0.0
    shared_rows: float = 0.0


@dataclass
class Overlap:
    """Two adapters. adapters: their paths, or ids.   norms, cosine: of whole updates; a module that one leaves alone counts as zero.

    only: modules that one of them changes.   uncompared: what cannot be compared, and why.
    """

    adapters: tuple[str, str]
    cosine: float | None
    norms: tuple[float, float]
    sites: list[SiteOverlap]
    only: tuple[list[str], list[str]]
    uncompared: dict[str, str]


@dataclass
class Compared:
    """Every pair of some adapters."""

    pairs: list[Overlap]


def compared(adapters: list[Adapter]) -> Compared:
    """The overlap of every pair."""
    names = [_name(a, i) for i, a in enumerate(adapters)]
    return Compared(
        [_pair(adapters[i], adapters[j], (names[i], names[j])) for i, j in combinations(range(len(names)), 2)]
    )


def _name(adapter: Adapter, position: int) -> str:
    path = adapter.meta.get("path")
    if path is None:
        return f"adapter {position + 1}"
    return called(Path(path)) if origin(Path(path)) else path


def norms(adapter: Adapter) -> tuple[dict[str, float], dict[str, str]]:
    """|D| of every site, and the sites whose update is not known without the base, with the reason."""
    found, lost = {}, {}
    for path, site in adapter.sites.items():
        try:
            found[path] = math.hypot(*(u.norm() for u in updates(site)))
        except Mismatch as e:
            lost[path] = e.message
    return found, lost


def updates(site: Site) -> list[Update]:
    """What a site adds, (out, in), however its weight is stored; a matrix for each expert of a stack.

    IA3 multiplies instead: its l - 1, the relative change, stands for it. Raises Mismatch when the base is needed.
    """
    tuner, p = site.tuner, {k: load(v, "f8") for k, v in site.params.items()}
    if not all(np.isfinite(v).all() for v in p.values()):
        raise Mismatch("holds NaN or infinity")
    if tuner.name == "ia3":
        return [Update(p["l"].reshape(-1, 1) - 1, np.ones((1, 1)))]
    if getattr(tuner, "transposed", False):
        tuner = replace(tuner, transposed=False)
    if tuner.name == "experts":
        count = p["A"].shape[0] // tuner.r
        parts = [tuner.one(p, e, count) for e in range(count)]
        return [Update(tuner.scale * q["B"], q["A"]) for q in parts]
    thin = tuner.factors(p)
    if thin is None:
        raise Mismatch(f"{tuner.name}: what it adds depends on the base")
    return [Update(thin[2] * thin[0], thin[1])]


def _pair(a: Adapter, b: Adapter, names: tuple[str, str]) -> Overlap:
    found = Overlap(names, None, (0.0, 0.0), [], (_only(a, b), _only(b, a)), _uncompared(a, b))
    squares, product = [0.0, 0.0], 0.0
    for path, site in a.sites.items():
        if path not in b.sites or path in found.uncompared:
            continue
        try:
            product += _compare(path, site, b.sites[path], found)
        except AdaptKitError as e:
            found.uncompared[path] = e.message
    for i, adapter in enumerate((a, b)):
        squares[i] = sum(s.norms[i] ** 2 for s in found.sites)
        squares[i] += sum(_square(adapter.sites[path], path, found) for path in found.only[i])
    found.norms = (math.sqrt(squares[0]), math.sqrt(squares[1]))
    found.cosine = _cosine(product, found.norms)
    return found


def _only(a: Adapter, b: Adapter) -> list[str]:
    return [path for path in a.sites if path not in b.sites]


def _uncompared(a: Adapter, b: Adapter) -> dict[str, str]:
    lost = dict.fromkeys(
        (*a.whole, *b.whole), "a tensor that is replaced outright: how far it moved depends on the base"
    )
    biased = [
        f"{p}.bias" for p in {**a.sites, **b.sites} if any("c" in x.sites[p].params for x in (a, b) if p in x.sites)
    ]
    lost |= dict.fromkeys(biased, "a bias that was trained with the update (lora_bias)")
    mixed = [p for p in a.sites if p in b.sites and _multiplies(a.sites[p]) != _multiplies(b.sites[p])]
    return lost | dict.fromkeys(mixed, "one adapter multiplies the weight (ia3), the other adds to it")


def _multiplies(site: Site) -> bool:
    return site.tuner.name == "ia3"


def _square(site: Site, path: str, found: Overlap) -> float:
    try:
        return sum(u.norm() ** 2 for u in updates(site))
    except Mismatch as e:
        found.uncompared[path] = e.message
        return 0.0


def _compare(path: str, one: Site, other: Site, found: Overlap) -> float:
    """Adds one site, and returns the inner product of its two updates."""
    a, b = updates(one), updates(other)
    if [u.shape for u in a] != [u.shape for u in b]:
        raise Mismatch(f"{len(a)} of {a[0].shape} in one, {len(b)} of {b[0].shape} in the other")
    product = sum(inner(x, y) for x, y in zip(a, b, strict=True))
    lengths = math.hypot(*(u.norm() for u in a)), math.hypot(*(u.norm() for u in b))
    site = SiteOverlap(path, _cosine(product, lengths), lengths)
    if len(a) == 1 and one.tuner.name != "ia3" and all(lengths):
        (U, V), (X, Y) = a[0].spaces(), b[0].spaces()
        columns, rows = angles(U, X), angles(V, Y)
        site.columns, site.rows = columns.tolist(), rows.tolist()
        site.shared_columns, site.shared_rows = shared(columns), shared(rows)
    found.sites.append(site)
    return product


def _cosine(product: float, lengths: tuple[float, float]) -> float | None:
    return max(-1.0, min(1.0, product / (lengths[0] * lengths[1]))) if all(lengths) else None


def unknown(lost: dict[str, str]) -> str:
    """What could not be compared, in one sentence."""
    first, why = next(iter(lost.items()))
    return f"{len(lost)} not compared, first: {quoted(first or 'the whole model')} ({why})"


def grid(values: dict[str, float | None]) -> tuple[list[str], list[Any], list[list[float]]]:
    """Values by site as a table: (module names, layers, rows by layer). NaN where there is none."""
    from ..select import layer

    spots = {path: (layer(path), _kind(path)) for path in values}
    layers = sorted({i for i, _ in spots.values()}, key=lambda i: (i is None, i or 0))
    kinds = list(dict.fromkeys(kind for _, kind in spots.values()))
    table = [[math.nan] * len(kinds) for _ in layers]
    for path, (i, kind) in spots.items():
        value = values[path]
        table[layers.index(i)][kinds.index(kind)] = math.nan if value is None else value
    return kinds, layers, table


def _kind(path: str) -> str:
    """The path with its layer's number left out: what is one column of the picture."""
    import re

    return re.sub(r"^.*?\.[^.]*\.\d+\.", "", path) or path
