"""Checkpoint: the tensors of a model on disk, by name. Opened from headers alone."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import AdaptKitWarning, Corrupt, Unsafe, Usage, quoted, some
from . import pickles, safetensors
from .entry import Entry
from .safepaths import inside, open_regular

SINGLE = ("model.safetensors", "pytorch_model.bin")
LARGEST_JSON = 100_000_000
LARGEST_EXTRA = 200_000_000
# what lies beside the weights and belongs to the model; READMEs speak of another model and stay behind
EXTRA = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe", ".py", ".yaml", ".yml"}
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
OTHER_ROUTES = {"onnx", "openvino", "original", "coreml", "gguf", "runs", "logs"}
TRAINING = ("optimizer", "scheduler", "trainer_state", "training_args", "rng_state", "adapter_", "adaptkit.json")


@dataclass
class Checkpoint:
    """The tensors of a model on disk.

    root: the folder (of the file, when a single file was given).
    entries: by name, in the order of the files and of the bytes in them.
    files: weight files in order.     metadata: of each safetensors file.
    """

    path: Path
    root: Path
    entries: dict[str, Entry]
    files: list[Path]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    index: str | None = None  # the name of the index file
    shards: Path | None = None  # the folder of a training checkpoint, whose tensors are in parts
    notes: list[str] = field(default_factory=list)  # what of it is not the model's

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, {} when a bare file was opened. Untrusted: nothing it names is imported."""
        where = self.root / "config.json"
        if not where.exists():
            if self.path.is_file():
                return {}
            raise Corrupt(
                "not found", where="config.json", hint=f"a model folder holds one ({quoted(self.path)} does not)"
            )
        return read_json(where)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: e.shape for name, e in self.entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries.values())

    @property
    def pickled(self) -> bool:
        return any(f.suffix != ".safetensors" for f in self.files)

    def extras(self) -> Iterator[tuple[Path, str]]:
        """(file, name) of everything beside the weights that the model needs: tokenizer, templates, code as data.

        Of sentence-transformers models also the weights of the modules after the first, which modules.json names.
        """
        if self.path.is_file():
            if (self.root / "config.json").is_file():
                yield self.root / "config.json", "config.json"
            return
        if self.shards:
            yield from beside(self.root)
            return
        parts, left = self._parts(), []
        for folder, folders, files in os.walk(self.root):
            relative = Path(folder).relative_to(self.root)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in OTHER_ROUTES)
            if len(relative.parts) > 1:
                folders.clear()
            for name in sorted(files):
                file = Path(folder) / name
                is_weights = relative.parts and file.suffix in WEIGHTS and not name.startswith(TRAINING)
                if is_weights and str(relative) not in parts:
                    left.append(str(relative / name))
                elif is_weights or (belongs(name) and file.stat().st_size <= LARGEST_EXTRA):
                    yield file, str(relative / name)
        if left:
            warn(f"weights in folders inside the base are left behind: {some(left)}")

    def _parts(self) -> set[str]:
        """The folders of modules that sentence-transformers runs after the model."""
        try:
            found = json.loads((self.root / "modules.json").read_bytes())
            return {str(part["path"]) for part in found if part.get("path")}
        except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):
            return set()  # another program's file of that name, or none; weights found there are warned of


def beside(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, name) of the files in a folder that belong to a model."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and belongs(file.name) and file.stat().st_size <= LARGEST_EXTRA:
            yield file, file.name


Stamps = dict[Path, tuple[int, int, int]]


def stamps(files: Iterable[Path]) -> Stamps:
    """Size, time and inode of files, to see later whether they are still the same."""
    return {f: _stamp(f) for f in files}


def unchanged(taken: Stamps) -> None:
    """Raises Corrupt when a file is not the one it was when its stamp was taken."""
    for file, stamp in taken.items():
        try:
            now = _stamp(file)
        except FileNotFoundError:
            now = None
        if now != stamp:
            raise Corrupt("changed while it was read", where=file.name, hint="run again when nothing writes to it")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder or a file: safetensors or PyTorch, single or sharded by an index.

    Raises Usage when there is nothing, Corrupt when a header or the index is wrong, Unsafe for a name outside the folder.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        raise Usage("not found", where=path, hint="give a model folder, a weight file or a Hub id (user/name)")
    found = _opened(path)
    _odd_names(found.entries)
    return found


def _opened(path: Path) -> Checkpoint:
    if not path.is_dir():
        return _of_files(path, path.parent, [path])
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise Usage("this is an adapter, not a model", where=path, hint="give the base model first, then the adapter")
    index = _index(path)
    if index is not None:
        return _sharded(path, index)
    return _of_files(path, path, [_single(path)])


def _odd_names(entries: dict[str, Entry]) -> None:
    """Warn of what is allowed and yet hardly meant; it is kept."""
    if odd := [n for n in entries if not n.isprintable()]:
        warn(f"{len(odd)} tensor names hold control characters ({some(odd, 1)}); kept")
    lower: dict[str, str] = {}
    if twins := [n for n in entries if lower.setdefault(n.lower(), n) != n]:
        warn(f"{some(twins, 1)} and {quoted(lower[twins[0].lower()])} differ in case only; both are kept")
    if empty := sum(not e.nbytes for e in entries.values()):
        warn(f"{empty:,} tensors hold no numbers; kept")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file. Raises Corrupt."""
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as f:
        if os.fstat(fd).st_size > LARGEST_JSON:
            raise Corrupt(f"larger than {LARGEST_JSON:,} bytes", where=path.name)
        raw = f.read()
    if raw.startswith(b"version https://git-lfs"):
        raise Corrupt("this is a git-lfs pointer, not the file", where=path.name, hint="run: git lfs pull")
    try:
        # json guesses UTF-16 by itself; the format is UTF-8
        found = safetensors.load_json(raw.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError as e:
        raise Corrupt(f"is not UTF-8 text (byte {e.start})", where=path.name) from None
    except Corrupt as e:
        raise e.at(path.name) from None
    if not isinstance(found, dict):
        raise Corrupt(f"holds a JSON {type(found).__name__}, an object is expected", where=path.name)
    return found


def read_weights(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and metadata of one weight file of either kind."""
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return pickles.read(path), {}
    if _starts(path, b"PK\x03\x04") or _starts(path, b"\x80"):
        return pickles.read(path), {}
    return safetensors.read(path)


def _of_files(path: Path, root: Path, files: list[Path]) -> Checkpoint:
    entries, metadata = read_weights(files[0])
    if not entries:
        raise Corrupt("holds no tensors", where=files[0].name)
    return Checkpoint(path, root, entries, files, {files[0].name: metadata})


def _single(path: Path) -> Path:
    for name in SINGLE:
        if (path / name).is_symlink() or (path / name).exists():
            return inside(path, name)
    found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors") or sorted(
        p for p in path.iterdir() if p.suffix in (".pth", ".pt", ".bin")
    )
    found = [p for p in found if not p.name.startswith(TRAINING)]
    if len(found) == 1:
        return inside(path, found[0].name)
    if found:
        raise Corrupt(
            f"{len(found)} weight files and no index ({some(p.name for p in found)})", where=path, hint="name one"
        )
    raise Corrupt("no weights found", where=path, hint="a model folder holds model.safetensors or pytorch_model.bin")


def _index(path: Path) -> Path | None:
    found = [path / f"{name}.index.json" for name in SINGLE if (path / f"{name}.index.json").exists()]
    if not found and not any((path / name).exists() for name in SINGLE):
        found = sorted(path.glob("*.safetensors.index.json"))[:1]
    if not found:
        return None
    single = path / found[0].name.removesuffix(".index.json")
    if single.exists() and single.name not in set(_weight_map(found[0]).values()):
        raise Corrupt(
            f"both {single.name} and {found[0].name} are there", where=path, hint="remove the one that is stale"
        )
    if found[0].name.startswith("pytorch_model") and (path / SINGLE[0]).exists():
        return None
    return found[0]


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise Corrupt("has no weight_map from tensor names to file names", where=index.name)
    return found


def _sharded(path: Path, index: Path) -> Checkpoint:
    promised = _weight_map(index)
    files = sorted({_shard(path, index, name, tensor) for tensor, name in promised.items()})
    entries: dict[str, Entry] = {}
    metadata = {}
    for file in files:
        found, metadata[file.name] = read_weights(file)
        for name in found.keys() & entries.keys():
            raise Corrupt(f"{quoted(name)!r} is also in {entries[name].file.name}", where=file.name)
        entries.update(found)
    _keeps_promises(index, promised, entries)
    _stale(path, files)
    return Checkpoint(path, path, entries, files, metadata, index.name)


def _shard(path: Path, index: Path, name: str, tensor: str) -> Path:
    try:
        file = inside(path, name)
    except Unsafe as e:
        raise Unsafe(f"{e.message} (of {quoted(tensor)})", where=index.name, hint=e.hint) from e
    if index.name.endswith(".safetensors.index.json") and file.suffix != ".safetensors":
        raise Unsafe(f"names {quoted(name)!r}, which is not a safetensors file, for {quoted(tensor)}", where=index.name)
    if not file.exists():
        raise Corrupt(f"promises {quoted(name)!r}, which is not there", where=index.name, hint="fetch it again")
    return file


def _keeps_promises(index: Path, promised: dict[str, str], entries: dict[str, Entry]) -> None:
    for name, shard in promised.items():
        if name not in entries or entries[name].file.name != Path(shard).name:
            raise Corrupt(f"promises {quoted(name)!r} in {quoted(shard)}, which lacks it", where=index.name)
    if extra := entries.keys() - promised.keys():
        warn(f"{index.name} does not list {some(sorted(extra))}; kept")
    total = (read_json(index).get("metadata") or {}).get("total_size")
    real = sum(e.nbytes for e in entries.values())
    if isinstance(total, int) and total != real and not any(f.file.suffix == ".bin" for f in entries.values()):
        warn(f"{index.name} says total_size {total:,}, the tensors take {real:,} bytes; corrected")


def _stale(path: Path, files: list[Path]) -> None:
    left = [p.name for p in path.glob("*.safetensors") if p.name not in {f.name for f in files}]
    if left and files[0].suffix == ".safetensors":
        warn(f"{some(sorted(left))} not in the index; left behind")


def belongs(name: str) -> bool:
    if name.startswith((".", *TRAINING)) or name.endswith(".index.json"):
        return False
    return Path(name).suffix in EXTRA or name.startswith(LEGAL)


def _starts(path: Path, magic: bytes) -> bool:
    fd = open_regular(path)
    try:
        return os.pread(fd, len(magic), 0) == magic
    finally:
        os.close(fd)


def _stamp(file: Path) -> tuple[int, int, int]:
    s = os.stat(file)
    return s.st_size, s.st_mtime_ns, s.st_ino


def warn(text: str) -> None:
    """Say something on a run that goes on."""
    warnings.warn(text, AdaptKitWarning, stacklevel=3)
