"""One weight file, given itself or in a folder of its own, and its tensor names for `sniff`."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdaptKitError, Mismatch
from ..store import pickles
from ..store.checkpoint import read_weights
from ..store.entry import Entry

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
OTHERS = ("config.json", "adapter_config.json", "model_index.json")  # of a folder that is something else


def weight_file(path: Path, *names: str) -> Path | None:
    """The file that holds an adapter's tensors: the path, or in a folder one of `names`, or else its only safetensors."""
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    if not path.is_dir() or any((path / n).exists() for n in OTHERS):
        return None
    if found := next((path / n for n in names if (path / n).is_file()), None):
        return found
    files = [p for p in path.glob("*.safetensors") if p.is_file()]
    return files[0] if len(files) == 1 else None


def names(path: Path, *known: str) -> set[str]:
    """The tensor names at a path; none for what cannot be read. Never raises: every format is asked about every path."""
    file = weight_file(path, *known)
    if file is None or (file.suffix != ".safetensors" and not pickles.is_pickle(file)):
        return set()
    try:
        return set(read_weights(file)[0])
    except (AdaptKitError, OSError):
        return set()


def tensors(path: Path, *known: str) -> tuple[dict[str, Entry], dict[str, str], Path]:
    """The entries and metadata of the file at a path, and the file. Raises Corrupt, or Mismatch when there is none."""
    file = weight_file(path, *known)
    if file is None:
        raise Mismatch("holds no weight file, or several", where=path, hint="give the file itself")
    entries, metadata = read_weights(file)
    if file.suffix != ".safetensors":
        pickles.check_crc(file)
    if not entries:
        raise Mismatch("holds no tensors", where=file.name, hint="was it saved from a sharded run?")
    return entries, metadata, file
