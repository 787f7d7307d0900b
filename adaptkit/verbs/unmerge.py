"""unmerge: an adapter out of a model's files again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter, Site
from ..engines.draft import draft
from ..errors import AdaptKitError, AdaptKitWarning, Mismatch, some
from ..store.arrays import load
from ..store.checkpoint import open_checkpoint, stamps
from .inputs import Source, adapters_of, dtype_of, files_of, size_of, weights_of
from .merge import Merged, execute


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
    checkpoint = open_checkpoint(Path(merged))
    taken = stamps(checkpoint.files)
    read = adapters_of(adapters)
    taken |= stamps(file for a in read for file in files_of(a))
    factors = weights_of(weights, len(read))
    backwards = [_inverse(a, w) for a, w in zip(reversed(read), reversed(factors), strict=True)]
    plan = draft(
        checkpoint, backwards, list(reversed(factors)), dtype=dtype_of(dtype), max_shard_size=size_of(max_shard_size)
    )
    plan.adapters = [Path(a.meta["path"]) for a in read if "path" in a.meta]
    plan.stamps = taken | stamps(file for file, _ in plan.extras)
    plan.options = {"verb": "unmerge", "weights": factors, "dtype": dtype_of(dtype)}
    if any(t.dtype in ("BF16", "F16") for t in plan.changed):
        text = "what merging rounded stays rounded: the result is within about a rounding of the base, not equal to it"
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
    return execute(plan, Path(output), start, device, engine, workers, overwrite, progress)


def _inverse(adapter: Adapter, weight: float) -> Adapter:
    """The adapter that undoes another, site by site."""
    name = Path(adapter.meta.get("path", "adapter")).name
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
