"""Format: one way to store an adapter. Formats do not know each other; the Adapter lies between them."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import registry
from ..adapter import Adapter
from ..errors import AdaptKitError, Mismatch, System, Usage, some
from ..store.checkpoint import read_weights
from ..store.disk import HINTS, sync_folder, why
from .files import weight_file


@dataclass(frozen=True)
class Note:
    """What a reader or a writer did to a part of an adapter.

    what: "folded", "padded", "fused", "dropped", "kept", "renamed" or "rounded".   where: the site or tensor.
    text: why, in one clause.
    """

    what: str
    where: str
    text: str


class Format(ABC):
    """How adapters of one program look on disk."""

    name: ClassVar[str]
    suffix: ClassVar[str] = ""  # a folder is written; otherwise one file whose name ends so
    cannot: ClassVar[tuple[str, ...]] = ()  # what it cannot hold, for people

    @abstractmethod
    def sniff(self, path: Path) -> bool:
        """Whether this is the format of `path`: from names and headers only."""

    @abstractmethod
    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        """The adapter at `path`. Params may be store Entries, read when they are needed.

        base: the model it belongs to, for formats whose files do not say enough by themselves.
        """

    def file(self, path: Path) -> Path:
        """The path itself, or the only file with this format's suffix in a folder that is no model."""
        if not path.is_dir() or (path / "config.json").exists():
            return path
        found = [p for p in path.iterdir() if p.suffix == self.suffix and p.is_file()]
        return found[0] if len(found) == 1 else path

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = ()
    ) -> list[Note]:
        """Write an adapter, or say what of it this format cannot hold; returns what had to be changed for it.

        drop: kinds of parts that may be left out ("whole", "tokens", "conv", ...), each with a Note.
        Raises Mismatch for what cannot be held, Usage when something is at `path` already.
        """
        raise Mismatch(f"format {self.name!r} can only be read")


def read(path: Path, name: str | None = None, *, base: Path | None = None) -> Adapter:
    """Read an adapter, in the format named, or in the one that recognises it. Raises with the path in the message."""
    path = Path(path)
    if not path.exists():
        raise Usage("not found", where=path, hint="give an adapter's folder or file, or a Hub id (user/name)")
    fitting = [name] if name else _fitting(path)
    if not fitting:
        raise _nothing_fits(path)
    if len(fitting) > 1:
        raise Usage(f"fits {' and '.join(fitting)}", where=path, hint="say which it is (--from)")
    with registry.blamed("formats", fitting[0]):
        method = registry.load("formats", fitting[0])().read
        adapter = method(path, **_taken(method, base=Path(base) if base else None))
    adapter.meta.setdefault("format", fitting[0])
    adapter.meta.setdefault("path", str(path))
    return adapter


def write(
    adapter: Adapter,
    path: str | Path,
    name: str = "peft",
    *,
    base: Path | None = None,
    drop: Collection[str] = (),
    **how: Any,
) -> list[Note]:
    """Write an adapter in a format; returns what had to be changed for it.

    how: further options of that format's `write`.
    Raises Mismatch for what the format cannot hold, Usage when something is there.
    """
    format, path = registry.load("formats", name)(), Path(path)
    if format.suffix and path.suffix != format.suffix:
        raise Usage(f"{name} is written as one file that ends in {format.suffix}", where=path)
    with registry.blamed("formats", name):
        options = _taken(format.write, base=Path(base) if base else None, drop=tuple(drop))
        return format.write(adapter, path, **options, **how) or []


def _taken(method: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a method has a place for: a plugin need not know those it has no use for."""
    known = inspect.signature(method).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return options
    return {k: v for k, v in options.items() if k in known}


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write one file at; it becomes `path` when the block ends well, and is removed if not.

    Raises Usage when something is at `path` already, System when the file system refuses.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise Usage("is there already", where=path, hint="choose another name, or delete it")
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # of a run that was killed
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.link(beside, path) if hasattr(os, "link") else os.rename(beside, path)  # link never replaces a file
        sync_folder(path.parent)
    except OSError as e:
        raise System(f"cannot be written ({why(e)})", where=path, hint=HINTS.get(e.errno)) from e
    finally:
        beside.unlink(missing_ok=True)


def _fitting(path: Path) -> list[str]:
    """The formats that recognise a path. Plugins are imported and asked only when no built-in one does."""
    for ours in (True, False):
        asked = [n for n in registry.names("formats") if registry.built_in("formats", n) == ours]
        if found := [n for n in asked if _recognises(n, path)]:
            return found
    return []


def _recognises(name: str, path: Path) -> bool:
    try:
        with registry.blamed("formats", name):
            return registry.load("formats", name)().sniff(path)
    except AdaptKitError:  # a format that is broken or lacks a dependency cannot claim a file
        return False


def _nothing_fits(path: Path) -> AdaptKitError:
    if path.is_dir() and (path / "config.json").exists():
        return Usage("this is a model, not an adapter", where=path, hint="give the base model first, then the adapter")
    if (file := weight_file(path)) is not None:
        try:
            read_weights(file)
        except AdaptKitError as e:  # empty, cut or hostile: that is why
            return e
    seen = (
        f"it holds {some(sorted(p.name for p in path.iterdir())) or 'nothing'}"
        if path.is_dir()
        else f"it ends in {path.suffix or 'nothing'}"
    )
    installed = ", ".join(registry.names("formats"))
    return Mismatch(
        f"no installed format ({installed}) recognises it; {seen}", where=path, hint="convert it to PEFT's format"
    )
