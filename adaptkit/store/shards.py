"""Checkpoints that training left in shards, opened as one: torch's DCP (FSDP) and DeepSpeed's ZeRO.

dcp        a folder with .metadata, a pickle that says which rectangle of which tensor lies where, and *.distcp files;
           or with several safetensors files, each of which says so itself
deepspeed  a folder with *_model_states.pt and *_optim_states.pt, or the one above it, where `latest` names it

No pickle is executed (symbolic.py), and nothing is put together in memory: each tensor becomes an Entry in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import AdaptKitError, Usage
from . import dcp, dcp_safetensors, deepspeed
from .checkpoint import Checkpoint
from .safepaths import inside, read_small

FSDP = "pytorch_model_fsdp_"  # what accelerate calls its folders


def kind(path: Path) -> str | None:
    """ "dcp", "deepspeed", or None for anything else."""
    if not path.is_dir():
        return None
    try:
        if _dcp(path) is not None or _sliced(path) is not None:
            return "dcp"
        return "deepspeed" if _deepspeed(path) is not None else None
    except AdaptKitError:  # a `latest` that names nothing of ours
        return None


def open_shards(path: Path) -> Checkpoint:
    """A sharded training checkpoint as one. Raises Corrupt for shards that are missing, Mismatch for unknown layouts."""
    path = Path(path)
    openers: tuple[tuple[Callable, Callable], ...] = (
        (_dcp, dcp.entries),
        (_sliced, dcp_safetensors.entries),
        (_deepspeed, deepspeed.entries),
    )
    for find, read in openers:
        if (folder := find(path)) is not None:
            entries, notes = read(folder)
            files = sorted({part.file for e in entries.values() for part in e.parts or (e,)})
            home = _home(folder, path)
            return Checkpoint(path, home, entries, files, shards=folder, notes=notes)
    raise Usage("holds no sharded checkpoint", where=path)


def nearby(folder: Path) -> str | None:
    """The name of a folder beside an adapter that holds the shards of its run, if there is one."""
    if folder.is_dir():
        for name in sorted(p.name for p in folder.iterdir() if p.is_dir()):
            if kind(folder / name):
                return name
    return None


def _dcp(path: Path) -> Path | None:
    if (path / ".metadata").is_file():
        return path
    found = [p for p in sorted(path.glob(f"{FSDP}*")) if (p / ".metadata").is_file()]
    return found[0] if len(found) == 1 else None


def _sliced(path: Path) -> Path | None:
    return path if dcp_safetensors.files(path) else None


def _deepspeed(path: Path) -> Path | None:
    if any(path.glob("*_model_states.pt")):
        return path
    if not (path / "latest").is_file():
        return None
    tag = read_small(path / "latest").decode("utf-8", "replace").strip()
    folder = inside(path, tag)
    return folder if folder.is_dir() and any(folder.glob("*_model_states.pt")) else None


def _home(folder: Path, path: Path) -> Path:
    """The folder with the files that belong to the model: beside the shards, or one above."""
    above = {path, folder, folder.parent}
    return next((p for p in (folder, path, folder.parent) if p in above and any(_told(p))), path)


def _told(folder: Path) -> list[Path]:
    return [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
