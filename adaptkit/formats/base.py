"""Format: one way to store an adapter. Formats do not know each other; the Adapter lies between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from .. import registry
from ..adapter import Adapter
from ..errors import AdaptKitError, Mismatch, Usage, some


class Format(ABC):
    """How adapters of one program look on disk."""

    name: ClassVar[str]

    @abstractmethod
    def sniff(self, path: Path) -> bool:
        """Whether this is the format of `path`: from names and headers only."""

    @abstractmethod
    def read(self, path: Path) -> Adapter:
        """The adapter at `path`. Params may be store Entries, read when they are needed."""

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write an adapter, or say what of it this format cannot hold."""
        raise Mismatch(f"format {self.name!r} can only be read")


def read(path: Path, name: str | None = None) -> Adapter:
    """Read an adapter, in the format named, or in the one that recognises it. Raises with the path in the message."""
    path = Path(path)
    if not path.exists():
        raise Usage("not found", where=path, hint="give an adapter's folder or file")
    fitting = [name] if name else _fitting(path)
    if not fitting:
        raise _nothing_fits(path)
    if len(fitting) > 1:
        raise Usage(f"fits {' and '.join(fitting)}", where=path, hint="read it in Python with the format's name")
    with registry.blamed("formats", fitting[0]):
        adapter = registry.load("formats", fitting[0])().read(path)
    adapter.meta.setdefault("format", fitting[0])
    adapter.meta.setdefault("path", str(path))
    return adapter


def _fitting(path: Path) -> list[str]:
    """The formats that recognise a path. Plugins are imported and asked only when no built-in one does."""
    for ours in (True, False):
        asked = [n for n in registry.names("formats") if registry.built_in("formats", n) == ours]
        if found := [n for n in asked if _recognises(n, path)]:
            return found
    return []


def write(adapter: Adapter, path: str | Path, name: str = "peft") -> None:
    """Write an adapter in a format. Raises Mismatch for what the format cannot hold, Usage when something is there."""
    registry.load("formats", name)().write(adapter, Path(path))


def _recognises(name: str, path: Path) -> bool:
    try:
        with registry.blamed("formats", name):
            return registry.load("formats", name)().sniff(path)
    except AdaptKitError:  # a format that is broken or lacks a dependency cannot claim a file
        return False


def _nothing_fits(path: Path) -> AdaptKitError:
    if path.is_dir() and (path / "config.json").exists():
        return Usage("this is a model, not an adapter", where=path, hint="give the base model first, then the adapter")
    seen = (
        f"it holds {some(sorted(p.name for p in path.iterdir()))}"
        if path.is_dir()
        else f"it ends in {path.suffix or 'nothing'}"
    )
    installed = ", ".join(registry.names("formats"))
    return Mismatch(
        f"no installed format ({installed}) recognises it; {seen}", where=path, hint="convert it to PEFT's format"
    )
