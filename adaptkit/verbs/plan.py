"""plan: what a merge would do, by how much memory and disk, without writing anything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter import Adapter
from ..engines.local import BLOCK, default_workers
from ..engines.plan import Plan, Target
from ..select import LAYER
from ..store.disk import nearest, room
from ..store.entry import Entry
from ..store.hub.ghost import glance
from ..store.output import Output
from .inputs import Source
from .merge import pair, planned

INTERPRETER = 70_000_000  # bytes that Python, NumPy and this package take before any work
TORCH = 220_000_000
TRANSFORMERS = 120_000_000  # and its tokenizer, beside torch


@dataclass
class Group:
    """Tensors that differ only in their layer, and what happens to them."""

    name: str
    what: str
    tensors: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Forecast:
    """What a merge would do.

    groups: tensors that change.     copied: bytes that are only copied.     bytes: of the output.
    rewritten: files beside the weights that change, for a soft prompt.
    memory: peak bytes of memory.    free: bytes of disk.                    fits: whether the output has room.
    """

    groups: list[Group]
    tensors: int
    changed: int
    copied: int
    bytes: int
    memory: int
    free: int
    fits: bool
    files: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)


def plan(
    base: str | Path | Adapter,
    adapters: Source | Sequence[Source] | None = None,
    output: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Forecast:
    """Say what a merge would do, without writing anything. Parameters and errors are those of merge.

    An output that has no room is reported, not raised; without one, the current folder's room is. Of a base at the Hub
    only the headers are fetched.
    """
    base, adapters = pair(base, adapters)
    how = {"weights": weights, "dtype": dtype, "max_shard_size": max_shard_size}
    with glance(base, "model") as folder:
        found = planned(folder, adapters, **how)
        inputs = [found.checkpoint.path, *found.adapters]
        if output is not None:  # checks the place only
            Output(Path(output), plan=found.fingerprint(), need=0, inputs=inputs, overwrite=overwrite)
        return forecast(found, Path(output or "."), workers)


def forecast(found: Plan, output: Path, workers: int | None = None) -> Forecast:
    """The figures of a plan."""
    free, _ = room(nearest(output.absolute()))
    return Forecast(
        groups=_groups(found.changed),
        tensors=len(found.targets),
        changed=len(found.changed),
        copied=sum(t.nbytes for t in found.targets if t.copied),
        bytes=found.nbytes,
        memory=_memory(found, workers or default_workers()),
        free=int(free),
        fits=found.need * 1.02 <= free,
        files=list(found.files),
        rewritten=sorted(found.texts),
    )


def _groups(targets: list[Target]) -> list[Group]:
    held: dict[tuple, list[Target]] = defaultdict(list)
    for t in targets:
        held[_pattern(t.name), _what(t), t.dtype, t.shape].append(t)
    return [
        Group(name, what, len(ts), sum(t.nbytes for t in ts), dtype, shape)
        for (name, what, dtype, shape), ts in held.items()
    ]


def _pattern(name: str) -> str:
    """A name with its layer and expert numbers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name) if re.match(LAYER, name) else name


def _what(t: Target) -> str:
    tuners = [f"{c.tuner.name} r={c.tuner.r}" if hasattr(c.tuner, "r") else c.tuner.name for c in t.changes]
    kinds = dict.fromkeys(([] if not t.replaced else ["replaced"]) + tuners)
    if t.appended:
        kinds = dict.fromkeys([*(k for k in kinds if k != "tokens"), f"{t.appended} rows appended"])
    more = f" x {len(t.changes)}" if len(t.changes) > len(kinds) else ""
    return " + ".join(kinds) + more


def _memory(found: Plan, workers: int) -> int:
    """An upper estimate: interpreter, buffers of each thread, factors of the largest file, the largest tensor done at once."""
    blocks = workers * BLOCK * 8
    factors = max((sum(_factor_bytes(t) for t in ts) for ts in found.files.values()), default=0)
    whole = [t.nbytes * 12 for t in found.targets if t.whole]
    torch = TORCH if any(c.tuner.arrays == "torch" for t in found.targets for c in t.changes) else 0
    torch = TORCH + TRANSFORMERS if found.virtual else torch
    return INTERPRETER + blocks + factors + max(whole, default=0) + torch


def _factor_bytes(t: Target) -> int:
    values = [v for c in t.changes for v in c.params.values() if isinstance(v, Entry)]
    return sum(v.numel for v in values) * 8
