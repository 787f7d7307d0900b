"""Rewrites that make LoRA fit a poorer format and change nothing that it computes, and the choice of what is held.

fold    s B A = 1 (s B) A                         one rounding, in the dtype that B is stored in
pad     B A = [B 0] [A; 0]                        exact: one rank for all
fuse    [Bq Aq; Bk Ak] = diag(Bq, Bk) [Aq; Ak]    exact; with one A for all it is [Bq; Bk] A
split   rows of B A = (rows of B) A               exact

Also how parts of a file become parts of a site without being read: `turned`, `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter, Site
from ..errors import Mismatch, Usage, quoted, some
from ..store.arrays import FLOATS, NUMPY, dtype_of, load, rounded, working
from ..store.entry import Entry
from .base import Note

WORDS = {  # kinds of parts, as people call them
    "whole": "tensors replaced outright, as of modules_to_save",
    "bias": "trained biases",
    "tokens": "trained token rows",
    "embedding": "LoRA on embeddings",
    "conv": "LoRA on convolutions",
    "dora": "DoRA's magnitudes",
    "ia3": "IA3",
    "experts": "LoRA on stacks of experts",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "ptuning": "P-tuning",
}
KIND = {NUMPY[k].name: k for k in FLOATS}  # of a NumPy dtype
PLAIN = ("lora", "dora")  # W' = W + s B A, and its norm


# params


def stored(value: Any) -> np.ndarray:
    """A param in the dtype that it is stored in: a NumPy array, a torch tensor, or an Entry, which is read."""
    array = load(value)
    name = dtype_of(value)
    return array if isinstance(value, np.ndarray) or array.dtype == NUMPY[name] else array.astype(NUMPY[name])


def turned(value: Any) -> Any:
    """The transpose of a matrix; an Entry stays unread."""
    if len(value.shape) != 2:
        raise Mismatch(f"a matrix is expected, {list(value.shape)} was found")
    if not isinstance(value, Entry):
        return value.T
    strides = value.strides or (value.shape[1], 1)
    return replace(value, shape=value.shape[::-1], strides=strides[::-1])


def rows(value: Any, start: int, stop: int) -> Any:
    """Rows start:stop of a param; an Entry stays unread."""
    if not isinstance(value, Entry) or not value.plain or value.dtype not in NUMPY:
        return (load(value) if isinstance(value, Entry) else value)[start:stop]
    wide = math.prod(value.shape[1:]) * NUMPY[value.dtype].itemsize
    shape = (stop - start, *value.shape[1:])
    return replace(value, shape=shape, offset=value.offset + start * wide, nbytes=(stop - start) * wide)


def same(a: Any, b: Any) -> bool:
    """Whether two params hold the same numbers, bit for bit."""
    if a is b or (isinstance(a, Entry) and a == b):
        return True
    if tuple(a.shape) != tuple(b.shape) or dtype_of(a) != dtype_of(b):
        return False
    return stored(a).tobytes() == stored(b).tobytes()


# one site


def with_scale(site: Site, scale: float, where: str = "") -> Site:
    """The same update with another scale: B, and a trained bias, take up the difference.

    One rounding, in the dtype that each is stored in. Raises Mismatch when a number leaves that dtype's range.
    """
    factor = site.tuner.scale / scale
    tuner = replace(site.tuner, alpha=scale * site.tuner.r, rslora=False)
    if math.isclose(factor, 1, rel_tol=1e-12):
        return Site(tuner, dict(site.params))
    more = {k: _times(site.params[k], factor, where or "a site") for k in ("B", "c") if k in site.params}
    return Site(tuner, {**site.params, **more})


def _times(value: Any, factor: float, where: str) -> np.ndarray:
    array = stored(value)
    if array.dtype.name not in KIND:
        raise Mismatch(f"{quoted(where)} is in {array.dtype}, which cannot be scaled")
    kind = KIND[array.dtype.name]
    out = np.empty(array.shape, NUMPY[kind])
    rounded(array.astype(working(kind)) * factor, kind, out)
    if np.isfinite(array.astype("f8")).all() and not np.isfinite(out.astype("f8")).all():
        raise Mismatch(f"{quoted(where)}: B times {factor:g} overflows {array.dtype}", hint="use --dtype float32")
    return out


def padded(site: Site, r: int) -> Site:
    """The same update with rank r: rows of zeros under A, columns of zeros beside B. Exact."""
    A, B, more = stored(site.params["A"]), stored(site.params["B"]), r - site.tuner.r
    if more < 0:
        raise ValueError(f"rank {site.tuner.r} cannot be padded to {r}")
    A = np.concatenate([A, np.zeros((more, *A.shape[1:]), A.dtype)])
    B = np.concatenate([B, np.zeros((B.shape[0], more, *B.shape[2:]), B.dtype)], axis=1)
    tuner = replace(site.tuner, r=r, alpha=site.tuner.scale * r, rslora=False)
    return Site(tuner, {**site.params, "A": A, "B": B})


def fused(sites: Sequence[Site]) -> Site:
    """Sites that lie one under the other in one weight, as one site. All of one scale.

    Of one rank when they share A, else of the sum of their ranks; of the narrowest dtype that holds all of theirs.
    """
    first = sites[0]
    if any(s.tuner.scale != first.tuner.scale for s in sites):
        raise ValueError("sites of different scales cannot be fused")
    Bs = _alike([s.params["B"] for s in sites])
    if all(same(s.params["A"], first.params["A"]) for s in sites):
        params = {"A": first.params["A"], "B": np.concatenate(Bs)}
        return Site(first.tuner, params | _joined(sites))
    A = np.concatenate(_alike([s.params["A"] for s in sites]))
    B = np.zeros((sum(len(b) for b in Bs), len(A)), Bs[0].dtype)
    down = right = 0
    for b in Bs:
        B[down : down + b.shape[0], right : right + b.shape[1]] = b
        down, right = down + b.shape[0], right + b.shape[1]
    tuner = replace(first.tuner, r=len(A), alpha=first.tuner.scale * len(A), rslora=False)
    return Site(tuner, {"A": A, "B": B} | _joined(sites))


def _joined(sites: Sequence[Site]) -> dict[str, np.ndarray]:
    held = [k for k in "mc" if k in sites[0].params]
    return {k: np.concatenate([m.reshape(-1) for m in _alike([s.params[k] for s in sites])]) for k in held}


def _alike(values: Sequence[Any]) -> list[np.ndarray]:
    """Params in one dtype that holds the numbers of each: NumPy knows none for float16 and bfloat16."""
    arrays = [stored(v) for v in values]
    dtypes = {a.dtype for a in arrays}
    if len(dtypes) == 1:
        return arrays
    wide = np.dtype("f8") if np.dtype("f8") in dtypes else np.dtype("f4")
    return [a.astype(wide) for a in arrays]


def split(site: Site, sizes: Sequence[int]) -> list[Site]:
    """A site on a weight that holds several, as one site for each. They share A; B, m and c are cut into rows."""
    parts, at = [], 0
    for size in sizes:
        cut = {k: rows(v, at, at + size) for k, v in site.params.items() if k != "A"}
        parts.append(Site(site.tuner, {"A": site.params["A"], **cut}))
        at += size
    return parts


# an adapter


def kinds(site: Site) -> set[str]:
    """What a site asks of a format; nothing for LoRA on a matrix."""
    asks = set() if site.tuner.name == "lora" else {site.tuner.name}
    if site.tuner.name in PLAIN:
        asks |= {"embedding"} if site.tuner.embedding else set()
        asks |= {"conv"} if len(site.params["A"].shape) > 2 else set()
        asks |= {"bias"} if "c" in site.params else set()
    return asks


def without(site: Site, kinds: Collection[str]) -> Site:
    """The site without its trained bias or DoRA's magnitudes: the low-rank part stays."""
    params = {k: v for k, v in site.params.items() if not (k == "c" and "bias" in kinds)}
    if "dora" not in kinds:
        return Site(site.tuner, params)
    del params["m"]
    shared = {f: getattr(site.tuner, f) for f in ("r", "alpha", "rslora", "transposed", "embedding", "dropout")}
    return Site(registry.load("tuners", "lora")(**shared), params)


def chosen(
    adapter: Adapter, name: str, holds: Collection[str], drop: Collection[str]
) -> tuple[dict[str, Site], dict[str, Any], list[Note]]:
    """The sites and whole tensors that a format holds, and Notes on those left out with leave.

    holds: kinds, as in WORDS.   drop: kinds that may be left out. Raises Mismatch for anything else.
    """
    unknown = sorted(set(drop) - set(WORDS) - {k for s in adapter.sites.values() for k in kinds(s)})
    if unknown:
        raise Usage(f"{some(unknown)} is no kind of part; there are {some(sorted(WORDS), 20)}", where="--drop")
    if adapter.about.get("layer_replication"):
        raise Mismatch(f"{name} cannot say that layers of the model are repeated (layer_replication)")
    lacking: dict[str, list[str]] = {}
    sites, notes = {}, []
    for path, site in adapter.sites.items():
        missing = kinds(site) - set(holds)
        for kind in missing - set(drop):
            lacking.setdefault(kind, []).append(path or "the whole model")
        if missing <= {"bias", "dora"}:
            sites[path] = without(site, missing)
        notes += [Note("dropped", path, f"{name} cannot hold {WORDS.get(k, k)}") for k in sorted(missing)]
    whole = dict(adapter.whole) if "whole" in holds else {}
    if adapter.whole and not whole:
        if "whole" not in drop:
            lacking["whole"] = list(adapter.whole)
        notes += [Note("dropped", n, f"{name} cannot hold {WORDS['whole']}") for n in adapter.whole]
    if lacking:
        raise _cannot(name, lacking, left=bool(sites or whole))
    if not sites and not whole:
        raise Mismatch(f"nothing is left to write: {name} holds none of what this adapter has")
    return sites, whole, notes


def _cannot(name: str, lacking: Mapping[str, list[str]], left: bool) -> Mismatch:
    """The refusal; left: whether anything would be left to write without the parts that are lacking."""
    text = " or ".join(f"{WORDS.get(k, k)} ({some(where)})" for k, where in sorted(lacking.items()))
    hint = None if name == "peft" else "--to peft holds them"
    if left:
        hint = f"--drop {','.join(sorted(lacking))} leaves them out"
    return Mismatch(f"{name} cannot hold {text}", hint=hint)


def finite(where: str, parts: Mapping[str, Any]) -> None:
    """Refuse numbers that are none, which would spoil every model they are added to."""
    for letter, value in parts.items():
        array = load(value)
        if array.dtype.kind in "fV" and not np.isfinite(array.astype("f4")).all():
            raise Mismatch(
                f"{quoted(where)} has numbers in {letter} that are not finite", hint="fetch or train it again"
            )
