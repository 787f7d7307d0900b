"""unmerge: an adapter out of a model's files again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter, Site
from ..errors import AdaptKitError, AdaptKitWarning, Mismatch, some
from ..store.arrays import load
from ..store.hub import called
from .inputs import Source
from .merge import Merged, execute, planned


def unmerge(
    merged: str | Path,
    adapters: Source | Sequence[Source],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    max_shard_size: str | int | None = None,
    engine: str = "local",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Take adapters out of a merged model, on files.

    Parameters are those of merge, `merged` is its output. What was rounded when merging stays rounded: a 16-bit model
    comes back within about a rounding of each number. Raises Mismatch for what cannot be taken out: tensors that were
    replaced, DoRA, token rows.
    """
    start = time.monotonic()
    how = {"weights": weights, "dtype": dtype, "max_shard_size": max_shard_size, "progress": progress}
    plan = planned(merged, adapters, **how, verb="unmerge", turn=_backwards)
    if any(t.dtype in ("BF16", "F16") for t in plan.changed):
        text = "what merging rounded stays rounded: the result is within about a rounding of the base, not equal to it"
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
    return execute(plan, Path(output), start, device, engine, workers, overwrite, progress)


def _backwards(adapters: list[Adapter], weights: list[float]) -> tuple[list[Adapter], list[float]]:
    """The adapters that undo others, the last one first."""
    pairs = list(zip(reversed(adapters), reversed(weights), strict=True))
    return [_inverse(a, w) for a, w in pairs], [w for _, w in pairs]


def _inverse(adapter: Adapter, weight: float) -> Adapter:
    """The adapter that undoes another, site by site."""
    name = called(Path(adapter.meta.get("path", "adapter")))
    if adapter.whole:
        raise Mismatch(
            f"replaced {some(adapter.whole)}: the old values are gone", where=name, hint="keep the base model"
        )
    try:
        sites = {path: _undo(site, weight) for path, site in adapter.sites.items()}
    except AdaptKitError as e:
        raise e.at(name) from None
    return replace(adapter, sites=sites, about={**adapter.about, "layer_replication": None})


def _undo(site: Site, weight: float) -> Site:
    params = {k: load(v, "f8") for k, v in site.params.items()} if _needs_numbers(site) else dict(site.params)
    if weight != 1 and _needs_numbers(site):
        raise Mismatch(f"{site.tuner.name} merged with a weight other than 1 cannot be taken out")
    tuner, params = site.tuner.inverse(params)
    return Site(tuner, dict(params))


def _needs_numbers(site: Site) -> bool:
    """Whether the inverse is made of the numbers; of B A only the sign changes."""
    return set(site.params) == {"l"} or site.tuner.arrays == "torch"
