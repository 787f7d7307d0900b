"""unmerge: an adapter out of a model's files again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter, Site
from ..errors import AdaptKitError, AdaptKitWarning, Mismatch, Usage, some
from ..store.arrays import load
from ..store.checkpoint import Checkpoint
from ..store.hub import called
from ..store.hub.ids import RECEIPT
from .inputs import Source, adapters_of, model_of
from .merge import Merged, execute, planned
from .receipt import inputs_said, receipt_of, strangers, weights_said


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

    Parameters are those of merge, `merged` is its output.   weights: left out, those of its adaptkit.json, or 1.
    What was rounded when merging stays rounded: a 16-bit model comes back within about a rounding of each number. Raises Mismatch for what cannot be taken out: tensors that were
    replaced, DoRA, token rows.
    """
    start = time.monotonic()
    model = model_of(merged, progress)
    read = adapters_of(adapters, progress, model)
    weights = _said(model, read) if weights is None else weights
    how = {"weights": weights, "dtype": dtype, "max_shard_size": max_shard_size, "progress": progress}
    plan = planned(model, read, **how, verb="unmerge", turn=_backwards)
    if any(t.dtype in ("BF16", "F16") for t in plan.changed):
        text = "what merging rounded stays rounded: the result is within about a rounding of the base, not equal to it"
        warnings.warn(text, AdaptKitWarning, stacklevel=2)
    return execute(plan, Path(output), start, device, engine, workers, overwrite, progress)


def _said(model: Checkpoint, adapters: list[Adapter]) -> list[float] | None:
    """The weights that adaptkit.json names. Raises Usage where it names them of other adapters, or in another order."""
    weights = weights_said(model.root, len(adapters), "taken out")
    recorded = receipt_of(model.root).get("inputs")
    if weights and isinstance(recorded, list) and (others := strangers(recorded[1:], inputs_said(adapters))):
        words = f"weights are of adapters with other bytes than {some(others)}"
        raise Usage(words, where=RECEIPT, hint="give those in that order, or say --weights")
    return weights


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
