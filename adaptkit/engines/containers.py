"""Which tensor goes into which file when a checkpoint changes its container: as it was, or filled up to a size.

safetensors: model.safetensors, model-00001-of-00002.safetensors, model.safetensors.index.json
pytorch:     pytorch_model.bin, pytorch_model-00001-of-00002.bin, pytorch_model.bin.index.json
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..store.checkpoint import Checkpoint
from .plan import Target


@dataclass(frozen=True)
class Container:
    """A kind of weight file. stem: what a model's files are called."""

    name: str
    ending: str
    stem: str


CONTAINERS = {
    "safetensors": Container("safetensors", ".safetensors", "model"),
    "pytorch": Container("pytorch", ".bin", "pytorch_model"),
}
OTHER_STEM = {"pytorch_model": "model", "model": "pytorch_model"}
NUMBERED = re.compile(r"-(\d+)-of-(\d+)$")


def stem(checkpoint: Checkpoint, container: Container) -> str:
    """What the output's files are called before their numbers: as the source's, in the spelling of the container."""
    first = checkpoint.index.removesuffix(".index.json") if checkpoint.index else checkpoint.files[0].name
    name = NUMBERED.sub("", first.rpartition(".")[0])
    shards = checkpoint.shards is not None
    loose = checkpoint.path.is_file() and not (checkpoint.root / "config.json").exists() and "adapter" not in name
    if shards or loose or not name:
        return container.stem
    base, dot, variant = name.partition(".")  # model.fp16.safetensors
    mine = base == container.stem or base not in OTHER_STEM
    return (base if mine else OTHER_STEM[base]) + dot + variant


def arranged(
    checkpoint: Checkpoint, targets: list[Target], container: Container, limit: int | None
) -> dict[str, list[Target]]:
    """Output file -> tensors. limit: the most bytes of one file, None to keep the source's layout."""
    shards = _filled(targets, limit) if limit is not None else _kept(checkpoint, targets)
    name, n = stem(checkpoint, container), len(shards)
    if n == 1:
        return {name + container.ending: shards[0]}
    return {f"{name}-{i:05}-of-{n:05}{container.ending}": held for i, held in enumerate(shards, 1)}


def _kept(checkpoint: Checkpoint, targets: list[Target]) -> list[list[Target]]:
    held: dict[str, list[Target]] = {f.name: [] for f in checkpoint.files}
    for t in targets:
        held[t.source.file.name].append(t)
    return [h for h in held.values() if h]


def _filled(targets: list[Target], limit: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    size = 0
    for t in targets:
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


def index_name(checkpoint: Checkpoint, container: Container) -> str:
    """The name under which readers look for the index."""
    base, dot, variant = stem(checkpoint, container).partition(".")
    return f"{base}{container.ending}.index{dot}{variant}.json"


def index(files: dict[str, list[Target]], aliases: dict[str, str]) -> dict | None:
    """Which tensor is in which file, None for a single file. Tensors that share a storage count once."""
    if len(files) == 1:
        return None
    where = {t.name: name for name, held in files.items() for t in held}
    where |= {alias: where[kept] for alias, kept in aliases.items()}
    total = sum(t.nbytes for held in files.values() for t in held)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
