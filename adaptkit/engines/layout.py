"""Which tensor goes into which file: as in the base, or filled up to a size."""

from __future__ import annotations

import re
from pathlib import Path

from ..store.checkpoint import Checkpoint
from .plan import Target

ENDING = ".safetensors"


def stem(checkpoint: Checkpoint) -> str:
    """What the output's files are called before their numbers: as in the base, "model" where that was PyTorch's."""
    if checkpoint.pickled:
        return "model"
    if checkpoint.index:
        return checkpoint.index.removesuffix(f"{ENDING}.index.json")
    name = checkpoint.files[0].name.removesuffix(ENDING)
    return "model" if "-of-" in name else name


def files(checkpoint: Checkpoint, targets: dict[str, Target], limit: int | None) -> dict[str, list[Target]]:
    """Output file -> tensors. limit: the most bytes of one file, None to keep the base's layout."""
    found = (
        _filled(stem(checkpoint), list(targets.values()), limit) if limit is not None else _kept(checkpoint, targets)
    )
    return found if len(found) > 1 else {stem(checkpoint) + ENDING: held for held in found.values()}


def _kept(checkpoint: Checkpoint, targets: dict[str, Target]) -> dict[str, list[Target]]:
    """The base's files; a tensor that the base does not have goes into the last one."""
    names = {f: _safe_name(f.name) for f in checkpoint.files}
    out: dict[str, list[Target]] = {name: [] for name in names.values()}
    last = names[checkpoint.files[-1]]
    for name, t in targets.items():
        base = checkpoint.entries.get(name)
        where = base.file if base is not None else getattr(t.source, "file", None)
        out[names.get(where, last)].append(t)
    return {name: held for name, held in out.items() if held}


def _safe_name(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    if name.endswith(ENDING):
        return name
    found = re.search(r"-\d+-of-\d+(?=\.)", name)
    return f"model{found[0]}{ENDING}" if found else f"{name.rpartition('.')[0]}{ENDING}"


def _filled(name: str, targets: list[Target], limit: int) -> dict[str, list[Target]]:
    shards: list[list[Target]] = [[]]
    size = 0
    for t in targets:
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return {f"{name}-{i:05}-of-{len(shards):05}{ENDING}": held for i, held in enumerate(shards, 1)}


def notes(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of all files of a checkpoint."""
    return {k: v for found in checkpoint.metadata.values() for k, v in found.items()}


def metadata(checkpoint: Checkpoint, files: dict[str, list[Target]]) -> dict[str, dict[str, str]]:
    """What each output file says of itself: what the base's files said, less what is no longer true.

    safetensors' save_model notes tied tensors it left out, as "lm_head.weight": "model.embed_tokens.weight".
    """
    held = {t.name for targets in files.values() for t in targets}
    said = notes(checkpoint)
    # a tied pair may be noted either way round; the one that is here now is the one that is kept
    turned = {v: k for k, v in said.items() if k in held and v not in held and v in checkpoint.entries}
    kept = {k: v for k, v in said.items() if k not in held} | turned
    return {name: {**kept, "format": kept.get("format", "pt")} for name in files}


def same_file(checkpoint: Checkpoint, targets: list[Target], said: dict[str, str]) -> Path | None:
    """The base's file that an output file is, when nothing in it changes: its header is then kept as it is, too."""
    sources = {getattr(t.source, "file", None) for t in targets if t.copied and not t.replaced}
    file = sources.pop() if len(sources) == 1 and all(t.copied and not t.replaced for t in targets) else None
    if file not in checkpoint.files or checkpoint.metadata.get(file.name) != said:
        return None
    held = [e for e in checkpoint.entries.values() if e.file == file]
    return file if held == [t.source for t in targets] and [e.name for e in held] == [t.name for t in targets] else None


def index(files: dict[str, list[Target]]) -> dict | None:
    """model.safetensors.index.json, None for a single file."""
    if len(files) == 1:
        return None
    total = sum(t.nbytes for held in files.values() for t in held)
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted((t.name, name) for name, held in files.items() for t in held)),
    }


def index_name(checkpoint: Checkpoint) -> str:
    """The name under which the index is looked for."""
    return f"{stem(checkpoint)}{ENDING}.index.json"
