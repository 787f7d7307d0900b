"""What several sites at one path add up to: the methods of `combine`, for one site or for all of one shape at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapter import Adapter, Site
from ..algebra import blend, lowrank
from ..algebra.randomised import Thin, truncated
from ..engines.local import single_threaded_blas
from ..errors import Mismatch, Usage, quoted
from ..store.arrays import load, shape_of
from . import thin
from .recipe import BLENDS, Recipe

Place = tuple[str, list[tuple[int, Site]]]  # a path, and the sites there with the number of their adapter
Sites = dict[str, Site]
Done = Callable[[int], None]


def loras(adapters: Sequence[Adapter], how: Recipe, device: Any, done: Done) -> Sites:
    """The combined sites of LoRA adapters, by path."""
    places = gathered(adapters)
    fitting("lora", places, how)
    if how.method == "svd":
        made = _svd(places, how, device, done)
    else:
        one = _cat if how.method == "cat" else _dense if how.is_svd else _factors
        made = _each(places, one, how, device, done)
    return _biased({path: made[path] for path, _ in places})


def _each(places: list[Place], one: Callable[..., Any], how: Recipe, device: Any, done: Done) -> Sites:
    """Site by site; dense matrices, which take time and are many, by several workers."""
    made: Sites = {}
    with single_threaded_blas(), ThreadPoolExecutor(how.workers if one is _dense and device is None else 1) as pool:
        try:
            jobs = [pool.submit(one, path, terms, how, device) for path, terms in places]
            for (path, terms), job in zip(places, jobs, strict=True):
                made[path] = _packed(path, terms, how, *job.result())
                done(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return made


def gathered(adapters: Sequence[Adapter]) -> list[Place]:
    """Every path that one of the adapters has, with those that have it."""
    places: dict[str, list[tuple[int, Site]]] = {}
    for i, adapter in enumerate(adapters):
        for path, site in adapter.sites.items():
            if site.tuner.name != "tokens":
                places.setdefault(path, []).append((i, site))
    return list(places.items())


def fitting(kind: str, places: list[Place], how: Recipe) -> None:
    """Raises Mismatch for sites that cannot be combined, by their shapes alone. kind: "lora", "ia3" or "prompt"."""
    for path, terms in places:
        {"lora": _one_module, "ia3": _one_side, "prompt": _one_length}[kind](path, terms, how)


def _one_module(path: str, terms: list[tuple[int, Site]], how: Recipe) -> None:
    seen = {i: (thin.sized(s)[:3], shape_of(s.params["A"])[2:], s.tuner.embedding) for i, s in terms}
    if len(set(seen.values())) > 1:
        shapes = " and ".join(
            f"{s.tuner.name} A {list(shape_of(s.params['A']))}, B {list(shape_of(s.params['B']))}" for _, s in terms
        )
        raise Mismatch(
            f"{quoted(path)} is not the same module in all adapters: {shapes}", hint="are their bases equal?"
        )
    ranks = sorted({s.tuner.r for _, s in terms})
    if how.method in BLENDS and len(ranks) > 1:
        raise Mismatch(
            f"{quoted(path)} has ranks {' and '.join(map(str, ranks))}, and {how.method} adds factors of one rank",
            hint=f"use --method svd, or resize one of the adapters to rank {ranks[0]}",
        )


def _one_side(path: str, terms: list[tuple[int, Site]], how: Recipe) -> None:
    if len({(s.tuner.feedforward, shape_of(s.params["l"])) for _, s in terms}) > 1:
        raise Mismatch(f"{quoted(path)} is scaled on different sides or by vectors of different length")


def _one_length(path: str, terms: list[tuple[int, Site]], how: Recipe) -> None:
    shapes = [shape_of(s.params["P"]) for _, s in terms]
    if len({s[1:] for s in shapes}) > 1 or (how.method == "linear" and len(set(shapes)) > 1):
        raise Mismatch(
            f"prompts of shapes {' and '.join(str(list(s)) for s in shapes)} cannot be combined by {how.method}"
        )
    if how.method == "cat" and set(how.weights) != {1.0}:
        raise Usage("tokens that follow one another are not weighted", where="--weights", hint="leave it out")


def _svd(places: list[Place], how: Recipe, device: Any, done: Done) -> Sites:
    terms = dict(places)
    jobs = [(path, [(how.weights[i], s) for i, s in found]) for path, found in places]
    made = {}
    for path, found in thin.spectra(jobs, device, done):
        made[path] = _packed(path, terms[path], how, *cut(found, rank(terms[path], how), how.clamp))
    return made


def rank(terms: list[tuple[int, Site]], how: Recipe) -> int:
    """The rank of the result: the one asked for, or the largest there, but no more than the matrix has."""
    _, out, into, _ = thin.sized(terms[0][1])
    return min(how.rank or max(s.tuner.r for _, s in terms), out, into)


def rank_after(terms: list[tuple[int, Site]], how: Recipe) -> int:
    """The rank that the combined site will have, without computing it."""
    total = sum(s.tuner.r for _, s in terms)
    if how.method == "svd":
        return min(rank(terms, how), total)
    return rank(terms, how) if how.is_svd else total if how.method == "cat" else terms[0][1].tuner.r


def cut(found: lowrank.Spectrum, r: int, clamp: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a rank, clamped if asked for: each expert's apart, with all values on B as in PEFT."""
    if clamp is None:
        return lowrank.split(found, r)
    L, R = lowrank.split_left(found, r)
    pairs = [lowrank.clamped(left, right, clamp) for left, right in zip(L, R, strict=True)]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def _cat(path: str, terms: list[tuple[int, Site]], how: Recipe, device: Any) -> tuple[np.ndarray, np.ndarray]:
    """B = [B_1 B_2 ...], A = [w_1 s_1 A_1; w_2 s_2 A_2; ...]: the exact sum."""
    pairs = [(how.weights[i] * s.tuner.scale, *thin.factors(s)) for i, s in terms]
    return np.concatenate([L for _, L, _ in pairs], -1), np.concatenate([c * R for c, _, R in pairs], -2)


def _factors(path: str, terms: list[tuple[int, Site]], how: Recipe, device: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and B blended apart, with the roots of w s: PEFT's linear family."""
    scales = [blend.roots(how.weights[i] * s.tuner.scale) for i, s in terms]
    sides = []
    for side, letter in enumerate("BA"):
        xs = [thin.factors(s)[side] for _, s in terms]
        randoms = [blend.generator(how.seed, path, i, letter) for i, _ in terms]
        xs = [blend.pruned(x, how.method, how.density, g) for x, g in zip(xs, randoms, strict=True)]
        sides.append(blend.blended(xs, [s[side] for s in scales], how.method, how.majority))
    return sides[0], sides[1]


def _dense(path: str, terms: list[tuple[int, Site]], how: Recipe, device: Any) -> tuple[np.ndarray, np.ndarray]:
    """The blend of the products, cut to the rank: the one kind that needs the dense matrix, one site at a time."""
    scaled = []
    for _, s in terms:
        L, R = thin.factors(s)
        scaled.append(((L * s.tuner.scale).astype("f4"), R.astype("f4")))
    weights, r, made = [how.weights[i] for i, _ in terms], rank(terms, how), []
    for e in range(len(scaled[0][0])):
        randoms = [blend.generator(how.seed, path, i, e) for i, _ in terms]
        pairs = [(L[e], R[e]) for L, R in scaled]
        with np.errstate(over="ignore", invalid="ignore"):
            D = blend.product_blend(pairs, weights, how.blend, how.density, how.majority, randoms)
        if not np.isfinite(D).all():
            raise Mismatch(f"{quoted(path)}: the result does not fit float32")
        made.append(
            _clamped(
                truncated(_on(D, device), r, int(blend.generator(how.seed, path, e, "svd").integers(1 << 62))),
                how.clamp,
            )
        )
    return np.stack([m[0] for m in made]), np.stack([m[1] for m in made])


def _clamped(found: Thin, clamp: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The factors, of which each has the root of the values; clamped, if asked for, with all values on B as in PEFT."""
    L, R = lowrank.numpy(found.L), lowrank.numpy(found.R)
    if clamp is None:
        return L, R
    root = np.sqrt(found.values).astype("f4")
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    return lowrank.clamped(L * root, R * inverse[:, None], clamp)


def _on(D: np.ndarray, device: Any) -> Any:
    if device is None:
        return D
    import torch

    return torch.from_numpy(D).to(device)


def _packed(path: str, terms: list[tuple[int, Site]], how: Recipe, L: np.ndarray, R: np.ndarray) -> Site:
    biases = [
        how.weights[i] * s.tuner.scale * load(s.params["c"], np.dtype("f8")).reshape(-1)
        for i, s in terms
        if "c" in s.params
    ]
    return thin.packed(path, terms[0][1], L, R, sum(biases) if biases else None)


def _biased(sites: Sites) -> Sites:
    """A trained bias is one setting for all sites of a file: those without get one of zeros."""
    if any("c" in s.params for s in sites.values()):
        for site in sites.values():
            site.params.setdefault("c", np.zeros(site.params["B"].shape[0], dtype="f4"))
    return sites


def scalings(adapters: Sequence[Adapter], how: Recipe, device: Any, done: Done) -> Sites:
    """l = w_1 l_1 + w_2 l_2 + ...  of IA3 adapters. Where an adapter has no vector its l is 1: it changes nothing there."""
    made, places = {}, gathered(adapters)
    fitting("ia3", places, how)
    for path, terms in places:
        held = {i: load(s.params["l"], np.dtype("f8")) for i, s in terms}
        l = sum(w * held.get(i, 1.0) for i, w in enumerate(how.weights))
        made[path] = Site(terms[0][1].tuner, {"l": np.asarray(l, dtype="f4")})
        done(1)
    return made


def prompts(adapters: Sequence[Adapter], how: Recipe, device: Any, done: Done) -> Sites:
    """P = w_1 P_1 + w_2 P_2 + ...  for prompts of one length, or the tokens of all, one after another (cat)."""
    fitting("prompt", gathered(adapters), how)
    sites = [a.sites[""] for a in adapters]
    P = [load(s.params["P"], np.dtype("f8")) for s in sites]
    made = np.concatenate(P) if how.method == "cat" else sum(w * p for w, p in zip(how.weights, P, strict=True))
    done(1)
    return {"": Site(replace(sites[0].tuner, tokens=len(made)), {"P": made.astype("f4")})}
