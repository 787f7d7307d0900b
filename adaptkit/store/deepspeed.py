"""DeepSpeed's ZeRO checkpoints: the float32 weights lie flat, in equal shares, in the optimizer's files.

ZeRO 1, 2   a group of parameters one after the other, cut into equal shares at the end:  flat = cat(rank 0, rank 1, ...)
ZeRO 3      each parameter cut into equal shares by itself:  p = cat(share of rank 0, share of rank 1, ...)[: numel]

The names and shapes are in *_model_states.pt, with the frozen parameters. The layout is that of
https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Corrupt, Mismatch, quoted
from . import pickles
from .entry import BITS, Entry, Part
from .rebuild import is_tensor
from .symbolic import Call, Table

RANK = re.compile(
    r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(?:model|optim)_states\.pt|mp_rank_(\d+)_model_states\.pt"
)
FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
HINT = "copy the files of all machines into one folder"


@dataclass
class State:
    """One file: its top dictionary, and where its storages lie."""

    path: Path
    root: dict[str, Any]
    find: pickles.Find

    def entry(self, name: str, value: Any) -> Entry:
        return pickles.entry(self.path, name, value, self.find)


def entries(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """The weights of a ZeRO checkpoint by name, in parts, and what was left out. Raises Corrupt or Mismatch."""
    models, optims = (_states(folder, f"*{kind}_states.pt") for kind in ("model", "optim"))
    found = _buffers(models[0])
    if not optims:
        found = _module(models[0])
    else:
        stage, world = _stage(optims)
        found |= _frozen(models, stage)
        shapes = _shapes(models[0])
        found |= _together(optims, shapes, world) if stage < 3 else _apart(optims, shapes, world)
    found |= _shared(models[0], found)
    found |= {n: e for n, e in _module(models[0]).items() if n not in found}  # neither trained nor frozen
    if not found:
        raise Corrupt("holds no tensors", where=folder.name)
    left = [f"the optimizer's state in {len(optims)} files"] if optims else []
    return found, left


def _states(folder: Path, pattern: str) -> list[State]:
    """Files of one kind, by rank."""
    ranked = []
    for path in folder.glob(pattern):
        found = RANK.fullmatch(path.name)
        if not found:
            raise Mismatch(
                f"{quoted(path.name)} is named as no file of ZeRO is (pipeline or expert parallel?)", where=folder.name
            )
        if int(found[2] or found[3] or 0):
            raise Mismatch("is split by tensor parallelism, which is not supported", where=path.name)
        ranked.append((int(found[1] or 0), path))
    states = []
    for i, (rank, path) in enumerate(sorted(ranked)):
        if rank != i:
            raise Corrupt(f"the files of rank {i} are not there", where=folder.name, hint=HINT)
        root, find = pickles.tree(path)
        states.append(State(path, _dict(root, path.name), find))
    return states


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Table):
        raise Corrupt("is not a dictionary as DeepSpeed writes it", where=where)
    return {k: v for k, v in value.items if isinstance(k, str)}


def _stage(optims: list[State]) -> tuple[int, int]:
    """The ZeRO stage, and how many ranks there are. Raises Corrupt when files are missing."""
    state = _optimizer(optims[0])
    if "zero_stage" not in state:
        raise Mismatch("is not a ZeRO checkpoint", where=optims[0].path.name)
    told = state["zero_stage"]
    stage = told.args[0] if isinstance(told, Call) and told.args else told
    if type(stage) is not int or stage not in FLAT:
        raise Mismatch(f"ZeRO stage {quoted(stage)} is not supported", where=optims[0].path.name)
    count = state.get("partition_count")
    world = max(count) if isinstance(count, list) and all(type(n) is int for n in count) and count else count
    if type(world) is not int or world != len(optims):
        raise Corrupt(f"{len(optims)} of {quoted(world)} ranks are there", where=optims[0].path.parent.name, hint=HINT)
    return stage, world


def _optimizer(state: State) -> dict[str, Any]:
    return _dict(state.root.get("optimizer_state_dict"), state.path.name)


def _shapes(model: State) -> list[dict[str, tuple[int, ...]]]:
    """The trained parameters of each group, in the order in which they lie."""
    groups = model.root.get("param_shapes")
    if groups is None:
        raise Mismatch(
            "has no param_shapes", where=model.path.name, hint="it is of DeepSpeed before 0.3.15: convert it there"
        )
    return [_sizes(group, model.path.name) for group in (groups if isinstance(groups, list) else [groups])]


def _sizes(table: Any, where: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, size in _dict(table, where).items():
        given = size.args[0] if isinstance(size, Call) and size.name == "torch.Size" and size.args else size
        if not isinstance(given, tuple | list) or not all(type(n) is int and 0 <= n < 2**40 for n in given):
            raise Corrupt(f"{quoted(name)} has no shape", where=where)
        found[name] = tuple(given)
    return found


def _flat(optim: State, stage: int) -> list[Entry]:
    """The flat float32 tensors of one rank, one for each group."""
    groups = _optimizer(optim).get(FLAT[stage])
    if not isinstance(groups, list) or not groups or not all(is_tensor(g) for g in groups):
        raise Mismatch(
            f"has no {FLAT[stage]}", where=optim.path.name, hint="was it saved without the optimizer's state?"
        )
    found = [optim.entry(f"group {i}", g) for i, g in enumerate(groups)]
    if any(not e.plain or len(e.shape) != 1 for e in found):
        raise Mismatch("its groups are not flat", where=optim.path.name)
    return found


def _together(optims: list[State], shapes: list[dict], world: int) -> dict[str, Entry]:
    """ZeRO 1 and 2: each group is one long vector, dealt out to the ranks."""
    ranks = [_flat(o, 2) for o in optims]
    if any(len(groups) != len(shapes) for groups in ranks):
        raise Corrupt(f"has {len(ranks[0])} groups, param_shapes lists {len(shapes)}", where=optims[0].path.name)
    found = {}
    for i, group in enumerate(shapes):
        flat, at = [groups[i] for groups in ranks], 0
        for name, shape in group.items():
            found[name] = _cut(name, shape, flat, at, math.prod(shape))
            at += math.prod(shape)
        total, step = sum(e.numel for e in flat), 2 * world
        if -(-at // step) * step != -(-total // step) * step:
            raise Corrupt(f"group {i} holds {total:,} numbers, its parameters need {at:,}", where=optims[0].path.name)
    return found


def _apart(optims: list[State], shapes: list[dict], world: int) -> dict[str, Entry]:
    """ZeRO 3: each parameter is dealt out by itself, and each rank's shares lie one after the other."""
    ranks = [_flat(o, 3) for o in optims]
    found, at = {}, 0
    for group in shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            share = -(-numel // world)
            pieces = [_cut(name, (share,), flat, at, share) for flat in ranks]
            found[name] = _joined(name, shape, pieces)
            at += share
    total = sum(e.numel for e in ranks[0])
    if at > total or any(sum(e.numel for e in flat) != total for flat in ranks):
        raise Corrupt(f"rank 0 holds {total:,} numbers, its parameters need {at:,}", where=optims[0].path.name)
    return found


def _cut(name: str, shape: tuple[int, ...], flat: list[Entry], at: int, numel: int) -> Entry:
    """numel elements from `at` on of vectors that lie one after the other."""
    parts, done, begin = [], 0, 0
    for e in flat:
        first, last = max(at, begin), min(at + numel, begin + e.numel)
        if first < last:
            offset = e.offset + (first - begin) * (BITS[e.dtype] // 8)
            parts.append(Part(e.file, offset, (0, 1), (done, done + last - first), max(numel, 1)))
            done += last - first
        begin += e.numel
    if done != numel:
        raise Corrupt(
            f"{quoted(name)} has {done:,} of its {numel:,} numbers",
            where=flat[0].file.name,
            hint=HINT,
        )
    dtype = flat[0].dtype
    where = parts[0] if parts else Part(flat[0].file, flat[0].offset, (0, 0), (0, 0), 0)
    return Entry(name, dtype, shape, where.file, where.offset, numel * BITS[dtype] // 8, parts=tuple(parts))


def _joined(name: str, shape: tuple[int, ...], pieces: list[Entry]) -> Entry:
    """A tensor from equal shares, the padding at its end left out."""
    numel = math.prod(shape)
    parts, at = [], 0
    for piece in pieces:
        for p in piece.parts:
            left, right = p.columns[0] + at, min(p.columns[1] + at, numel)
            if left < right:
                parts.append(replace(p, columns=(left, right), width=max(numel, 1)))
        at += piece.numel
    if at < numel:
        raise Corrupt(f"{quoted(name)} has {at:,} of its {numel:,} numbers", where=pieces[0].file.name, hint=HINT)
    first = pieces[0]
    nbytes = numel * BITS[first.dtype] // 8
    return Entry(name, first.dtype, shape, first.file, first.offset, nbytes, parts=tuple(parts))


def _frozen(models: list[State], stage: int) -> dict[str, Entry]:
    """Parameters that were not trained: whole in ZeRO 1 and 2, in equal shares in ZeRO 3."""
    model = models[0]
    if not isinstance(model.root.get("frozen_param_shapes"), Table):
        return {}
    shapes = _sizes(model.root["frozen_param_shapes"], model.path.name)
    held = [_dict(m.root.get("frozen_param_fragments"), m.path.name) for m in (models if stage == 3 else models[:1])]
    found = {}
    for name, shape in shapes.items():
        if any(name not in h for h in held):
            raise Corrupt(f"the frozen {quoted(name)} is not there", where=model.path.name)
        pieces = [m.entry(name, h[name]) for m, h in zip(models, held, strict=False)]
        if stage == 3:
            if not all(p.plain for p in pieces):
                raise Mismatch(f"the frozen {quoted(name)} is not flat", where=model.path.name)
            flat = [_cut(name, (p.numel,), [p], 0, p.numel) for p in pieces]
            found[name] = _joined(name, shape, flat)
        elif pieces[0].shape != shape:
            raise Corrupt(
                f"{quoted(name)} has shape {list(pieces[0].shape)}, {list(shape)} expected", where=model.path.name
            )
        else:
            found[name] = pieces[0]
    return found


def _module(model: State) -> dict[str, Entry]:
    """The tensors of the module that hold numbers; ZeRO 3 saves the others empty."""
    table = model.root.get("module")
    tensors = _dict(table, model.path.name) if isinstance(table, Table) else {}
    found = {name: model.entry(name, value) for name, value in tensors.items() if is_tensor(value)}
    return {name: e for name, e in found.items() if e.numel}


def _buffers(model: State) -> dict[str, Entry]:
    names = model.root.get("buffer_names")
    module = _module(model)
    return {n: module[n] for n in (names if isinstance(names, list) else []) if isinstance(n, str) and n in module}


def _shared(model: State, found: dict[str, Entry]) -> dict[str, Entry]:
    """Further names of tensors."""
    return {
        a: replace(found[b], name=a)
        for a, b in _aliases(model.root.get("shared_params"))
        if b in found and a not in found
    }


def _aliases(value: Any) -> Iterator[tuple[str, str]]:
    pairs = value.items if isinstance(value, Table) else value if isinstance(value, list) else []
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(n, str) for n in pair):
            yield pair[0], pair[1]
