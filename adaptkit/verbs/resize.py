"""resize: a LoRA at another rank, by cutting the singular values of each site's update. The base is not needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..algebra import lowrank
from ..engines.device import checked
from ..errors import Mismatch
from ..formats.peft.write import write
from ..store import destination
from ..store.arrays import load
from . import thin
from .beside import tokenizer
from .inputs import Source, adapters_of
from .receipt import paths_of, said
from .recipe import how_thin


@dataclass
class Resize:
    """One site. energy: share of the squared singular values kept.   error: |old - new| / |old|, in Frobenius norm."""

    name: str
    old: int
    new: int
    energy: float
    error: float
    values: list[float] = field(default_factory=list, repr=False)


@dataclass
class Resized:
    """What was resized.    energy, error: of the whole adapter.    parameters: numbers in the factors, before and after."""

    output: Path | None
    sites: list[Resize]
    energy: float
    error: float
    parameters: tuple[int, int]
    plot: Path | None = None
    seconds: float = 0.0


def resize(
    adapter: Source,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    plot: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Resized:
    """Give a LoRA another rank, keeping as much of its update as possible.

    rank: of every site, at most what it has.    energy: or, share of the squared singular values to keep, which gives each
    site the smallest rank that does; max_rank bounds it.    plot: a picture of the singular values, which needs matplotlib.
    output: a PEFT folder that appears when it is complete.  device: "auto", "cpu" or "cuda".   progress: (sites, of sites).

    Raises Usage, Corrupt, Mismatch or System.
    """
    start = time.monotonic()
    if plot is not None:
        from . import heatmap, spectra

        plot = heatmap.checked(plot)
    (read,) = adapters_of(adapter)
    inputs = paths_of([read])
    destination.checked(Path(output), inputs, overwrite)
    thin.check_numbers(read)
    where = checked(device)
    made, report = resized(read, rank=rank, energy=energy, max_rank=max_rank, device=where, progress=progress)
    receipt = said({"verb": "resize", "rank": rank, "energy": energy, "max_rank": max_rank}, [read])
    write(made, Path(output), overwrite=overwrite, inputs=inputs, beside=tokenizer([read]), said=receipt)
    report.output, report.plot = Path(output), plot
    if plot is not None:
        spectra.draw(report, plot)
    report.seconds = time.monotonic() - start
    return report


def resized(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    device: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Adapter, Resized]:
    """The same on an Adapter in memory. Params may be torch tensors; those of the result are NumPy float32.

    device: a torch device to compute on, None for NumPy. Tensors replaced outright and token rows are kept.
    """
    how_thin(rank, energy, max_rank)
    thin.check_thin(adapter)
    jobs = [(p, [(1.0, s)]) for p, s in adapter.sites.items() if s.tuner.name != "tokens"]
    if not jobs:
        raise Mismatch("holds nothing that has a rank", where=adapter.meta.get("path"))
    sites, rows = dict(adapter.sites), {}
    for path, found in thin.spectra(jobs, device):
        old = adapter.sites[path]
        wanted = rank or max(lowrank.rank_for(s, energy) for s in found.s)
        new = min(wanted, max_rank or wanted, old.tuner.r, found.s.shape[-1])
        c = old.tuner.scale * load(old.params["c"], np.dtype("f8")).reshape(-1) if "c" in old.params else None
        sites[path] = thin.packed(path, old, *lowrank.split(found, new), c)
        rows[path] = _row(path, old.tuner.r, new, found.s)
        if progress:
            progress(len(rows), len(jobs))
    made = Adapter(sites, dict(adapter.whole), {k: v for k, v in adapter.meta.items() if k == "base"}, _about(adapter))
    return made, _report([rows[p] for p, _ in jobs], adapter, made)


def _about(adapter: Adapter) -> dict[str, Any]:
    return {k: adapter.about[k] for k in ("task_type", "bias", "peft_version", "revision") if k in adapter.about}


def _row(path: str, old: int, new: int, s: np.ndarray) -> Resize:
    """s: (E, k), all experts of a site count together."""
    squares = lowrank.squared(s)
    total, lost = squares.sum(), squares[:, new:].sum()
    share = float(lost / total) if total else 0.0
    return Resize(path, old, new, 1 - share, share**0.5, [float(v) for v in np.hypot.reduce(s, axis=0)])


def _report(rows: list[Resize], before: Adapter, after: Adapter) -> Resized:
    norms = [float(np.hypot.reduce(r.values)) if r.values else 0.0 for r in rows]
    peak = max(norms) or 1.0
    weights = [(n / peak) ** 2 for n in norms]
    total = sum(weights)
    lost = sum(w * (1 - r.energy) for w, r in zip(weights, rows, strict=True)) / total if total else 0.0
    return Resized(None, rows, float(1 - lost), float(lost**0.5), (_count(before), _count(after)))


def _count(adapter: Adapter) -> int:
    params = [v for s in adapter.sites.values() for k, v in s.params.items() if k in "AB"]
    return sum(int(np.prod(v.shape)) for v in params)
