"""From adapters and a checkpoint to a plan: every site and every whole tensor finds its place on disk, or it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter, Site
from ..errors import AdaptKitError, Mismatch, quoted
from ..store.arrays import WORDS, load, shape_of
from ..store.checkpoint import Checkpoint
from ..store.conversions import Edge
from ..store.entry import Entry
from ..store.hub import called
from ..store.names import direct, locate, prefixes
from ..store.quantised import refuse_quantised
from . import checks, layout, soft
from .ends import Ends
from .orientation import square
from .plan import Change, Plan, Target, addable, matrix, target
from .replication import replicated


@dataclass
class _Draft:
    """The plan while it is made: the tensors of the output by name, and config.json as it will be."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    entries: dict[str, Entry]
    dtype: str | None
    targets: dict[str, Target]
    ends: Ends

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: t.shape for name, t in self.targets.items()}


def draft(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
) -> Plan:
    """The plan of a merge. dtype: "float32", "bfloat16", "float16", or None to keep each tensor's.

    Raises Mismatch for the first thing that does not fit, before anything is written.
    """
    config = dict(checkpoint.config)
    adapters, prompt = soft.split(adapters, weights)
    refuse_quantised(checkpoint)
    checks.config(checkpoint)
    entries, config = replicated(checkpoint.entries, config, adapters)
    ends = Ends(config, entries, layout.notes(checkpoint))
    stored = WORDS.get(dtype or "", None)
    d = _Draft(checkpoint, config, entries, stored, {}, ends)
    entries, d.config = ends.prepared(adapters, config)
    d.targets = {name: target(name, e, stored) for name, e in entries.items()}
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        try:
            _whole(d, adapter, weight)
            if adapter.sites or prompt is None or prompt.index != i:
                _sites(d, adapter, weight, i)
            checks.coverage(adapter, d.targets)
        except AdaptKitError as e:
            raise e.at(called(Path(adapter.meta.get("path", "adapter")))) from None
    if prompt is None:
        _order(d)
    d.config = ends.grown(d.targets, d.config, adapters)
    extras = ends.tokenizer(list(checkpoint.extras()))
    texts, ids = {}, range(0)
    if prompt is not None:
        bake = soft.Bake(checkpoint, ends, prompt)
        d.config, extras = bake.apply(d.targets, d.config, extras)
        texts, ids = bake.texts, bake.ids
    if dtype and d.config:
        d.config = {**d.config, "dtype" if "dtype" in d.config else "torch_dtype": dtype}
    files = layout.files(checkpoint, d.targets, max_shard_size)
    new_config = d.config if d.config != checkpoint.config else None
    return Plan(checkpoint, files, new_config, extras, [], layout.metadata(checkpoint, files), texts, ids)


def _whole(d: _Draft, adapter: Adapter, weight: float) -> None:
    """Tensors replaced outright. New ones are added when the adapter's settings name them."""
    known = prefixes(d.shapes)
    places = {n: [Edge(n, found)] for n in adapter.whole if (found := direct(n, d.targets, known))}
    lost = [n for n in adapter.whole if n not in places and not (d.ends.head is None and d.ends.is_end(n))]
    if lost:
        places |= locate(d.config, d.shapes, lost, optional=lost)
        _added(adapter, [n for n in lost if n not in places])
    for name, value in adapter.whole.items():
        for edge in places.get(name) or [Edge(name, name)]:
            _replace(d, adapter, name, edge, value, weight)
    checks.saved_modules(adapter, list(d.targets))


def _added(adapter: Adapter, lost: list[str]) -> None:
    """Raises Mismatch for a tensor that the base lacks, unless it belongs to a head that the settings name."""
    heads = [h for h in adapter.about.get("modules_to_save") or () if h]
    for name in lost:
        path = name.rpartition(".")[0]
        if not any(path.endswith(h) or f".{h}." in f".{path}" for h in heads):
            raise Mismatch(f"{quoted(name)} is not in the model, and modules_to_save does not name it")


def _replace(d: _Draft, adapter: Adapter, name: str, edge: Edge, value: Any, weight: float) -> None:
    disk = edge.disk
    if d.ends.drops(disk, adapter):
        return
    if weight != 1:
        raise Mismatch(
            f"replaces {quoted(name)} outright, which cannot be weighted by {weight:g}", hint="give it weight 1"
        )
    if edge.disk_rows or edge.disk_expert is not None:
        raise Mismatch(f"replaces {quoted(name)}, which the base stores as a part of {quoted(disk)}", hint=RESAVE)
    old = d.targets.get(disk)
    if old is not None and old.changes:
        raise Mismatch(
            f"replaces {quoted(name)} after another adapter changed it", hint="give the adapter that replaces it first"
        )
    _apart(d, disk, adapter)
    source = part_of(value, edge)
    if old is not None and isinstance(source, Entry) and source.dtype != old.dtype:
        addable(old)
    if old is not None and old.replaced and not _equal(old.source, source):
        raise Mismatch(f"two adapters replace {quoted(name)} by different tensors", hint="merge one of them")
    stored = d.dtype or (old.dtype if old is not None else checks.main_dtype(d.entries))
    new = target(disk, source, stored, replaced=True)
    if old is not None and new.shape != old.shape and not d.ends.may_resize(disk, old.shape, new.shape, adapter):
        raise Mismatch(f"{quoted(name)}: the adapter's is {list(new.shape)}, the model has {list(old.shape)}")
    d.targets[disk] = new


RESAVE = "save the base with the names that the model uses"


def part_of(value: Any, edge: Edge) -> Entry | np.ndarray:
    """The part of a whole tensor that lies under one name on disk; without reading it where its bytes are in one piece."""
    plain = isinstance(value, Entry) and value.plain and not edge.transposed and edge.permutation is None
    if not plain:
        array = load(value, "f4")
        array = array[edge.expert] if edge.expert is not None else array
        array = array[slice(*edge.rows)] if edge.rows else array
        array = array.T if edge.transposed else array
        return np.ascontiguousarray(array[list(edge.permutation)] if edge.permutation is not None else array)
    if edge.expert is not None:
        value = _rows_of(value, edge.expert, edge.expert + 1)
        value = replace(value, shape=value.shape[1:])
    return _rows_of(value, *edge.rows) if edge.rows else value


def _rows_of(entry: Entry, start: int, stop: int) -> Entry:
    row = entry.nbytes // max(entry.shape[0], 1)
    return replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        offset=entry.offset + start * row,
        nbytes=(stop - start) * row,
        crc=0,
    )


def _apart(d: _Draft, disk: str, adapter: Adapter) -> None:
    """Raises Mismatch when a change meant for one of two tied ends would reach the other through their one tensor."""
    if d.ends.tied and d.ends.head is None and disk == d.ends.embedding and id(adapter) not in d.ends.same:
        raise Mismatch(f"changes {quoted(disk)}, which is also the output head", hint="serve it as an adapter")


def _equal(a: Any, b: Any) -> bool:
    return shape_of(a) == shape_of(b) and bool((load(a) == load(b)).all())


def _sites(d: _Draft, adapter: Adapter, weight: float, index: int) -> None:
    sites = d.ends.sites(adapter)
    if not sites:
        if not adapter.whole:
            raise Mismatch("changes nothing")
        return
    if "" in sites:
        sites[""].tuner.weight(None, {})  # refuses, in its own words
    places = locate(d.config, d.shapes, list(sites))
    for path, site in sites.items():
        try:
            with registry.blamed("tuners", site.tuner.name):
                _site(d, adapter, site, places[path], weight, index)
        except AdaptKitError as e:
            e.message = f"{quoted(path)}: {e.message}"
            raise


def _site(d: _Draft, adapter: Adapter, site: Site, edges: list[Edge], weight: float, index: int) -> None:
    shape = _parameter_shape(edges, {e.disk: d.targets[e.disk].shape for e in edges})
    shapes = {k: shape_of(v) for k, v in site.params.items()}
    tuner = site.tuner.fit(shape, shapes, square(site.tuner, edges[0].parameter, d.config, adapter))
    for edge in edges:
        if tuner.name != "tokens":
            _apart(d, edge.disk, adapter)
        for change in _changes(tuner, site, edge, shape, d.targets[edge.disk].shape, weight, index):
            _add(d, edge.disk, change)
    if tuner.changes_bias(site.params):
        _bias(d, tuner, site, edges, weight, index)


def _changes(tuner, site: Site, edge: Edge, shape: tuple, disk: tuple, weight: float, index: int) -> list[Change]:
    """The changes of one stored tensor: one, or one for each expert of a stack."""
    base = {"tuner": tuner, "params": site.params, "weight": weight, "adapter": index, "turned": edge.transposed}
    base |= {"part": edge.rows, "order": edge.permutation}
    if len(shape) != 3 or tuner.name != "experts":
        rows = edge.disk_rows or (0, matrix(disk)[0])
        if edge.disk_expert is not None:
            rows = _within(edge.disk_expert, edge.disk_rows, disk)
        return [Change(rows=rows, shape=disk if edge.disk_rows is None else (rows[1] - rows[0], *disk[1:]), **base)]
    experts = range(shape[0]) if edge.expert is None else [edge.expert]
    more = {"experts": shape[0]}
    if len(disk) == 2:
        return [Change(rows=edge.disk_rows or (0, disk[0]), shape=disk, expert=e, **more, **base) for e in experts]
    where = [e if edge.disk_expert is None else edge.disk_expert for e in experts]
    return [
        Change(rows=_within(at, edge.disk_rows, disk), shape=disk[1:], expert=e, **more, **base)
        for e, at in zip(experts, where, strict=True)
    ]


def _within(expert: int, rows: tuple[int, int] | None, disk: tuple[int, ...]) -> tuple[int, int]:
    """Rows of one matrix of a stack, counted in the stack."""
    start, stop = rows or (0, disk[1])
    return expert * disk[1] + start, expert * disk[1] + stop


def _parameter_shape(edges: list[Edge], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the model's parameter, put together from the parts on disk."""
    first, disk = edges[0], shapes[edges[0].disk]
    if len(edges) == 1 and first == Edge(first.parameter, first.disk):
        return disk
    inner = disk[1:] if first.disk_expert is not None or (len(disk) == 3 and first.expert is not None) else disk
    rows, columns = (inner[-1], inner[-2]) if first.transposed and len(inner) == 2 else (inner[0], inner[-1])
    if any(e.rows for e in edges):
        rows = max(e.rows[1] for e in edges if e.rows)
    elif first.disk_rows:
        rows = first.disk_rows[1] - first.disk_rows[0]
    experts = [e.expert for e in edges if e.expert is not None]
    matrix_shape = (rows, columns) if len(inner) == 2 else (rows, *inner[1:])
    if len(disk) == 3 and first.expert is None and first.disk_expert is None and len(inner) == 3:
        return (disk[0], disk[2], disk[1]) if first.transposed else disk
    return (max(experts) + 1, *matrix_shape) if experts else matrix_shape


def _add(d: _Draft, disk: str, change: Change) -> None:
    t = d.targets[disk]
    addable(t)
    _in_one_piece(disk, change)
    in_stack = len(t.shape) == 3 and change.shape == t.shape[1:] or change.expert is not None and len(t.shape) == 3
    view = (t.shape[0] * t.shape[1], t.shape[2]) if in_stack else matrix(t.shape)
    if t.changes and t.view != view:
        raise Mismatch(f"{quoted(disk)} is changed as a kernel and as a stack")
    if not change.tuner.follows and any(c.adapter != change.adapter and c.what == change.what for c in t.changes):
        raise Mismatch(
            f"{change.tuner.name} must be the only change of {quoted(disk)}, or the first",
            hint="merge one adapter at a time",
        )
    d.targets[disk] = replace(t, view=view, changes=[*t.changes, change])


def _bias(d: _Draft, tuner, site: Site, edges: list[Edge], weight: float, index: int) -> None:
    for edge in edges:
        name = edge.disk.removesuffix("weight") + "bias"
        if edge.disk_expert is not None or edge.expert is not None:
            raise Mismatch("has a bias inside a stack of experts, which is not supported")
        if name not in d.targets:
            if "c" in site.params:
                raise Mismatch("has a trained bias (lora_bias), but the model's layer has none")
            continue
        t = d.targets[name]
        addable(t)
        rows = edge.disk_rows or (0, t.shape[0])
        more = {"part": edge.rows, "order": edge.permutation}
        change = Change(tuner, site.params, weight, index, rows, (rows[1] - rows[0],), what="bias", **more)
        _in_one_piece(name, change)
        d.targets[name] = replace(t, changes=[*t.changes, change])


def _in_one_piece(disk: str, change: Change) -> None:
    """Raises Mismatch when only a part of what the tuner sees lies in a tensor, and its update is not a thin product."""
    sliced = change.turned or change.order is not None or change.part is not None
    if sliced and not (change.what == "weight" and change.is_thin):
        raise Mismatch(
            f"{change.tuner.name} on a weight that the checkpoint stores in parts ({quoted(disk)})", hint=RESAVE
        )


def _order(d: _Draft) -> None:
    names = [n for n, t in d.targets.items() if t.changes or t.replaced]
    if not names:
        raise Mismatch("nothing in the model would change")
