"""combine: several adapters into one. A sum of thin products stays thin, so the dense matrix is never made for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter, Site
from ..engines.device import checked
from ..errors import Mismatch, Usage, some
from ..formats.peft.write import write
from ..store import destination
from ..store.arrays import load
from ..store.checkpoint import warn
from ..tuners.experts import packing
from . import sums, thin
from .beside import tokenizer
from .inputs import Source, adapters_of
from .receipt import paths_of, said
from .recipe import Recipe, recipe

VIRTUAL = ("prompt", "ptuning", "prefix")
WAYS = {"lora": sums.loras, "ia3": sums.scalings, "prompt": sums.prompts}


@dataclass
class Combined:
    """What a combination made.

    ranks: rank -> how many sites have it.    kept: names of the tensors replaced outright that were taken over.
    """

    output: Path
    method: str
    weights: list[float]
    sites: int
    ranks: dict[int, int]
    kept: list[str]
    seconds: float = 0.0


def combine(
    adapters: Source | Sequence[Source],
    output: str | Path,
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    clamp: float | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    take: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Combined:
    """Combine several adapters into one.

    adapters: folders, files or Adapter values of one kind.   output: a PEFT folder that appears when it is complete.
    method: svd, cat, linear, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four with _svd.
    weights: of the updates; 1 each when left out, 1/n each for IA3 and prompts.    rank: of the svd methods' result.
    clamp: quantile to cut the svd methods' factors at.     density: share that ties, dare and magnitude_prune keep.
    majority_sign: "total" or "frequency", how ties elects a sign.       seed: of what dare drops.
    take: number, from 1, of the adapter whose replaced tensors are kept where adapters differ.
    device: "auto", "cpu" or "cuda".    workers: threads of the other _svd methods, with two matrices each.
    progress: called with (sites, of sites).

    Raises Usage, Corrupt, Mismatch or System. docs/combine.md has the formulas.
    """
    start = time.monotonic()
    read = _readable(adapters, output, overwrite)
    how = _recipe(read, method, weights, rank, clamp, density, majority_sign, seed, device, workers)
    made = _combined(read, how, take, checked(device), progress)
    _warn_of_nothing(made)
    chosen = {k: v for k, v in vars(how).items() if k not in ("device", "workers")}  # which change no number
    options = {"verb": "combine", "take": take, **chosen}
    beside, receipt = tokenizer(read, take), said(options, read)
    write(made, Path(output), overwrite=overwrite, inputs=paths_of(read), beside=beside, said=receipt)
    found = described(made, Path(output), how)
    found.seconds = time.monotonic() - start
    return found


def _readable(adapters: Source | Sequence[Source], output: str | Path, overwrite: bool) -> list[Adapter]:
    """The adapters, with sound numbers, when the result has a place to go to."""
    read = adapters_of(adapters)
    destination.checked(Path(output), paths_of(read), overwrite)
    for adapter in read:
        thin.check_numbers(adapter)
    return read


def _warn_of_nothing(made: Adapter) -> None:
    if made.sites and not made.whole and all("B" in s.params and not s.params["B"].any() for s in made.sites.values()):
        warn("every update of the result is zero: it changes nothing")


def combined(
    adapters: Sequence[Adapter],
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    clamp: float | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    take: int | None = None,
    device: Any = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Adapter:
    """The same on Adapter values in memory. Params may be torch tensors; those of the result are NumPy float32.

    device: a torch device to compute on, None for NumPy. The rest as `combine`.
    """
    how = _recipe(adapters, method, weights, rank, clamp, density, majority_sign, seed, str(device or "cpu"), workers)
    return _combined(list(adapters), how, take, device, progress)


def rehearsed(
    adapters: Source | Sequence[Source],
    output: str | Path,
    *,
    take: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    **options: Any,
) -> Combined:
    """What `combine` would make, with everything checked but what only the sums show, and nothing written."""
    read = _readable(adapters, output, overwrite)
    checked(device)
    options["majority"] = options.pop("majority_sign", "total")
    left_out = {"weights": None, "rank": None, "clamp": None, "density": None, "seed": 0}
    how = _recipe(read, **{**left_out, **options, "device": device})
    whole, tokens = replaced(read, take)
    places, kind = sums.gathered(read), kind_of(read)
    sums.fitting(kind, places, how)
    _packed_alike(read)
    _meta(read)
    tokenizer(read, take)
    ranks = Counter(sums.rank_after(t, how) for _, t in places if kind == "lora")
    kept = sorted(whole) + sorted(tokens)
    return Combined(Path(output), how.method, list(how.weights), len(places), dict(sorted(ranks.items())), kept)


def described(adapter: Adapter, output: Path, how: Recipe) -> Combined:
    """An adapter in numbers."""
    ranks = Counter(s.tuner.r for s in adapter.sites.values() if hasattr(s.tuner, "r"))
    tokens = [p for p, s in adapter.sites.items() if s.tuner.name == "tokens"]
    kept = sorted(adapter.whole) + sorted(tokens)
    count = len(adapter.sites) - len(tokens)
    return Combined(output, how.method, list(how.weights), count, dict(sorted(ranks.items())), kept)


def kind_of(adapters: Sequence[Adapter]) -> str:
    """lora, ia3 or prompt. Raises Mismatch when adapters are of several kinds."""
    kinds = {k: thin.named(a) or f"adapter {i}" for i, a in enumerate(adapters, 1) for k in _kinds(a)}
    if len(kinds) > 1:
        who = some([f"{name} is {kind}" for kind, name in sorted(kinds.items())])
        hint = "merge them into their base, one after another"
        raise Mismatch(f"adapters of different kinds cannot be combined: {who}", hint=hint)
    kind = next(iter(kinds), "lora")
    return "prompt" if kind in VIRTUAL else kind


def _kinds(adapter: Adapter) -> set[str]:
    names = {s.tuner.name for s in adapter.sites.values()} - {"tokens"}
    return {n if n == "ia3" or n in VIRTUAL else "lora" for n in names}


def _recipe(
    adapters: Sequence[Adapter], method: str, weights: Sequence[float] | None, *rest: Any, **named: Any
) -> Recipe:
    if not adapters:
        raise Usage("no adapter was given", where="ADAPTER")
    kind = kind_of(adapters)
    if kind == "lora":
        for adapter in adapters:
            thin.check_thin(adapter)
    elif method not in (("linear",) if kind == "ia3" else ("linear", "cat")):
        what = "IA3 vectors are" if kind == "ia3" else "prompts are"
        hint = "use --method linear" + (" or cat" if kind == "prompt" else "")
        raise Usage(f"{what} not combined by {method}", where="--method", hint=hint)
    if weights is None and kind != "lora" and method == "linear":
        weights = [1 / len(adapters)] * len(adapters)
    how = recipe(len(adapters), method, weights, *rest, **named)
    if kind == "ia3" and abs(sum(how.weights) - 1) > 1e-6:
        warn(f"the weights add up to {sum(how.weights):g}: what no adapter changes is scaled by that")
    return how


def _combined(
    adapters: list[Adapter], how: Recipe, take: int | None, device: Any, progress: Callable[[int, int], None] | None
) -> Adapter:
    whole, tokens = replaced(adapters, take)
    _packed_alike(adapters)
    total, done = len(sums.gathered(adapters)), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    sites = WAYS[kind_of(adapters)](adapters, how, device, count)
    return Adapter(sites | tokens, whole, _meta(adapters), _about(adapters, sites, take))


def replaced(adapters: Sequence[Adapter], take: int | None) -> tuple[dict[str, Any], dict[str, Site]]:
    """Tensors and token rows that replace the base's: no sum of them means anything, so all agree or one is taken."""
    if take is not None:
        if not 1 <= take <= len(adapters):
            raise Usage(f"{take} is not the number of one of {len(adapters)} adapters", where="--take")
        return _outright(adapters[take - 1])
    first = _outright(adapters[0])
    for other in adapters[1:]:
        if different := _different(first, _outright(other)):
            raise Mismatch(
                f"not replaced by the same numbers in all adapters: {some(different)}",
                hint="say with --take N whose is kept, counted from 1",
            )
    return first


def _outright(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Site]]:
    return dict(adapter.whole), {p: s for p, s in adapter.sites.items() if s.tuner.name == "tokens"}


def _different(a: tuple[dict[str, Any], dict[str, Site]], b: tuple[dict[str, Any], dict[str, Site]]) -> list[str]:
    left, right = ({**x[0], **{(p, k): v for p, s in x[1].items() for k, v in s.params.items()}} for x in (a, b))
    names = [n for n in left if n not in right] + [n for n in right if n not in left]
    names += [n for n in left if n in right and not np.array_equal(load(left[n]), load(right[n]))]
    return list(dict.fromkeys(n if isinstance(n, str) else n[0] for n in names))


def _meta(adapters: Sequence[Adapter]) -> dict[str, str]:
    bases = list(dict.fromkeys(b for a in adapters if (b := a.meta.get("base"))))
    if len(bases) > 1:
        warn(f"the adapters were trained on different bases ({some(bases)}); the result names none")
    return {"base": bases[0]} if len(bases) == 1 else {}


def _about(adapters: Sequence[Adapter], sites: dict[str, Site], take: int | None) -> dict[str, Any]:
    """Settings that the result keeps: of prompts all, of the rest what the adapters agree on.

    `bias` says what replaced biases are, so it is that of the adapter they come from.
    """
    if "" in sites:
        return dict(adapters[0].about) | {"num_virtual_tokens": sites[""].tuner.tokens}
    first = adapters[0].about
    about = {"peft_version": first.get("peft_version")} if _packed_alike(adapters) else {}
    alike = [k for k in ("task_type", "revision") if k in first]
    about |= {k: first[k] for k in alike if all(a.about.get(k) == first[k] for a in adapters)}
    return about | {"bias": adapters[(take or 1) - 1].about.get("bias", "none")}


def _packed_alike(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters pack experts one way. Raises Mismatch when they do not and no shape tells which."""
    ways = {packing(str(a.about.get("peft_version") or "")) for a in adapters}
    stacks = {p: s for a in adapters for p, s in a.sites.items() if s.tuner.name == "experts"}
    square = [p for p, (_, out, into, _) in zip(stacks, map(thin.sized, stacks.values()), strict=True) if out == into]
    if len(ways) > 1 and square:
        raise Mismatch(
            f"{some(square)} is square, and the adapters come from versions of PEFT that pack experts differently",
            hint="save them again with one version of PEFT",
        )
    return len(ways) == 1
