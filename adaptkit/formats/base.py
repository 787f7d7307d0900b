"""Format: one way to store an adapter. Formats do not know each other; the Adapter lies between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .. import registry
from ..adapter import Adapter
from ..errors import AdaptKitError, Mismatch, Usage, some


@dataclass(frozen=True)
class Note:
    """What a reader or a writer did to a part of an adapter.

    what: "folded", "padded", "dropped", "kept", "renamed".    where: the site or tensor.    text: why, in one clause.
    """

    what: str
    where: str
    text: str


class Format(ABC):
    """How adapters of one program look on disk.

    suffix: "" writes a folder, anything else one file that ends so.    cannot: what it cannot hold, for people.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ""
    cannot: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def sniff(self, path: Path) -> bool:
        """Whether this is the format of `path`: from names and headers only."""

    @abstractmethod
    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        """The adapter at `path`. Params may be store Entries, read when they are needed. base: the model, if given."""

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = ()
    ) -> list[Note]:
        """Write an adapter, or say what of it this format cannot hold. drop: kinds of parts that may be left out."""
        raise Mismatch(f"format {self.name!r} can only be read")


def read(path: Path, name: str | None = None, *, base: Path | None = None) -> Adapter:
    """Read an adapter, in the format named, or in the one that recognises it. Raises with the path in the message."""
    path = Path(path)
    if not path.exists():
        raise Usage("not found", where=path, hint="give an adapter's folder or file, or a Hub id (user/name)")
    found = [name] if name else _fitting(path)
    if not found:
        raise _nothing_fits(path)
    if len(found) > 1:
        raise Usage(f"fits {' and '.join(found)}", where=path, hint="read it in Python with the format's name")
    options = {} if base is None else {"base": base}  # formats that need no base may not know the word
    with registry.blamed("formats", found[0]):
        adapter = registry.load("formats", found[0])().read(path, **options)
    adapter.meta.setdefault("format", found[0])
    adapter.meta.setdefault("path", str(path))
    return adapter


def _fitting(path: Path) -> list[str]:
    """The formats that recognise a path. Plugins are imported and asked only when no built-in one does."""
    for ours in (True, False):
        asked = [n for n in registry.names("formats") if registry.built_in("formats", n) == ours]
        if found := [n for n in asked if _recognises(n, path)]:
            return found
    return []


def write(adapter: Adapter, path: str | Path, name: str = "peft", **options: Any) -> list[Note]:
    """Write an adapter in a format. Raises Mismatch for what the format cannot hold, Usage when something is there."""
    given = {k: v for k, v in options.items() if v}
    with registry.blamed("formats", name):
        return list(registry.load("formats", name)().write(adapter, Path(path), **given) or ())


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
