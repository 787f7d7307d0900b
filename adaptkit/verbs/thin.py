"""Sites as thin products and back:  s B A, one product for each expert, at scale 1 in what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter, Site
from ..algebra import lowrank
from ..algebra.lowrank import Spectrum
from ..engines import checks
from ..engines.local import single_threaded_blas
from ..errors import AdaptKitError, Mismatch, quoted
from ..store.arrays import load, shape_of
from ..store.hub import called
from ..tuners.bdlora import BDLoRA
from ..tuners.experts import ExpertLoRA
from ..tuners.lora import LoRA

PLAIN = ("lora", "experts", "bdlora")
AT_ONCE = {"cpu": 2 << 20, "cuda": 32 << 20}  # numbers of one batch of sites: caches are small, devices want much
REASONS = {
    "dora": "DoRA divides by the norm of base weight plus update, so its update is no product B A and depends on the base",
    "pissa": "PiSSA's start took components out of the base weight, so its update depends on the base",
    "olora": "OLoRA's start took a part out of the base weight, so its update depends on the base",
    "kasa": "KaSA's start took components out of the base weight, so its update depends on the base",
}
RANKLESS = {
    "ia3": "IA3 vectors have no rank",
    "prompt": "a prompt has no rank",
    "ptuning": "a prompt has no rank",
    "prefix": "a prefix has no rank",
}
HINT = "merge it into its base model; what is then extracted from both is a plain LoRA"


def check_thin(adapter: Adapter) -> None:
    """Raises Mismatch, with the reason, for a site whose update is not s B A alone."""
    for path, site in adapter.sites.items():
        name = site.tuner.name
        if name in RANKLESS:
            raise Mismatch(RANKLESS[name], where=named(adapter), hint="only LoRA has one")
        if name not in (*PLAIN, "tokens"):
            why = REASONS.get(name, f"{quoted(name)} is not a product B A")
            raise Mismatch(f"{quoted(path)}: {why}", where=named(adapter), hint=HINT)
    if adapter.about.get("layer_replication"):
        raise Mismatch("layer_replication makes a model of other layers than the base", where=named(adapter), hint=HINT)


def check_numbers(adapter: Adapter) -> None:
    """Raises Corrupt for NaN and infinity; warns of an adapter that does nothing."""
    where = named(adapter) or "adapter"
    try:
        checks.numbers(adapter, f"{quoted(where)}: every update is zero")
    except AdaptKitError as e:
        raise e.at(where) from None


def named(adapter: Adapter) -> str | None:
    """The name of an adapter's folder, or its id at the Hub, for messages."""
    return called(Path(adapter.meta["path"])) if "path" in adapter.meta else None


def sized(site: Site) -> tuple[int, int, int, int]:
    """(experts, out, in, rank) of a site, from shapes alone."""
    A, B, t = shape_of(site.params["A"]), shape_of(site.params["B"]), site.tuner
    if isinstance(t, BDLoRA):
        return 1, B[0], A[1] * (t.blocks if t.side == "A" else 1), t.r
    return A[0] // t.r, B[0], math.prod(A[1:]), t.r


def factors(site: Site, dtype: str = "f8") -> tuple[np.ndarray, np.ndarray]:
    """(L, R) with s L R the update in (out, in) order, for each expert. L: (E, out, r)    R: (E, r, in)"""
    p = {k: load(site.params[k], np.dtype(dtype)) for k in "AB"}
    experts, out, into, r = sized(site)
    if isinstance(site.tuner, BDLoRA):
        L, R, _ = replace(site.tuner, transposed=False).factors(p)
        return L[None], R[None]
    return p["B"].reshape(out, r, experts).transpose(2, 0, 1), p["A"].reshape(experts, r, into)


def packed(path: str, like: Site, L: np.ndarray, R: np.ndarray, c: np.ndarray | None = None) -> Site:
    """A site of scale 1 with these factors, in the shapes of one that is there. L: (E, out, r)    R: (E, r, in)"""
    experts, out, r = L.shape
    with np.errstate(over="ignore"):
        A, B = R.astype("f4"), L.astype("f4")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise Mismatch(f"{quoted(path)}: the result does not fit float32", hint="are the weights meant to be so large?")
    spatial = shape_of(like.params["A"])[2:]
    middle = math.prod(spatial) if spatial else 1
    params: dict[str, Any] = {
        "A": np.ascontiguousarray(A.reshape(experts * r, R.shape[-1] // middle, *spatial)),
        "B": np.ascontiguousarray(B.transpose(1, 2, 0).reshape(out, r * experts, *[1] * len(spatial))),
    }
    if c is not None:
        params["c"] = c.astype("f4")
    kind = ExpertLoRA if like.tuner.name == "experts" else LoRA
    old = like.tuner
    return Site(kind(r=r, alpha=float(r), transposed=old.transposed, embedding=old.embedding), params)


Job = tuple[str, list[tuple[float, Site]]]  # a path, and weights with sites; the scale is not in the weight yet


def spectra(
    jobs: Sequence[Job], device: Any = None, done: Callable[[int], None] | None = None
) -> Iterator[tuple[str, Spectrum]]:
    """(path, spectrum of the weighted sum there), sites of one shape together. Spectra are (E, ...) NumPy arrays or tensors.

    device: a torch device, where float32 is used; None for NumPy and float64, which costs little on thin factors.
    """
    for batch in batches(jobs, AT_ONCE["cpu" if device is None else "cuda"]):
        loaded = [[(w * s.tuner.scale, *factors(s)) for w, s in terms] for _, terms in batch]
        experts = [made[0][1].shape[0] for made in loaded]
        terms = [_stacked([made[k] for made in loaded], device) for k in range(len(loaded[0]))]
        with single_threaded_blas():  # on matrices this thin, threads wait for each other longer than they work
            found, at = lowrank.spectrum(terms), 0
        for (path, _), n in zip(batch, experts, strict=True):
            part = slice(at, at + n)
            yield path, Spectrum(found.U[part], found.s[part], found.V[part])
            at += n
        if done:
            done(len(batch))


def batches(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Jobs of one shape, together while they have no more than so many numbers."""
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(sized(s)[1:] for _, s in job[1]), []).append(job)
    for group in groups.values():
        batch: list[Job] = []
        room = most
        for job in group:
            need = sum(e * (out + into) * r for e, out, into, r in (sized(s) for _, s in job[1]))
            if batch and need > room:
                yield batch
                batch, room = [], most
            batch.append(job)
            room -= need
        yield batch


def _stacked(terms: list[tuple[float, np.ndarray, np.ndarray]], device: Any) -> tuple[np.ndarray, Any, Any]:
    c = np.concatenate([np.full(len(L), scale) for scale, L, _ in terms])
    L, R = (np.concatenate([t[k] for t in terms]) for k in (1, 2))
    if device is None:
        return c, L, R
    import torch

    # float32 could lose what float64 read; factors come as float32 or narrower, so it does not
    return c, *(torch.from_numpy(x.astype("f4")).to(device) for x in (L, R))
