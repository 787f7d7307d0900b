"""What lies beside adapters and goes with them: the tokenizer, without which a grown vocabulary means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapter import Adapter
from ..engines.ends import TOKENIZER
from ..store.checkpoint import warn
from ..store.safepaths import open_regular

Files = dict[str, Path]


def tokenizer(adapters: Sequence[Adapter], take: int | None = None) -> list[tuple[Path, str]]:
    """The tokenizer's files that all adapters with one agree on, to copy; warns and gives none when they differ.

    take: the number, from 1, of the adapter whose files are taken.
    """
    if take is not None:
        found = [_files(adapters[take - 1])]
    else:
        found = [files for a in adapters if (files := _files(a))]
    if any(not _same(found[0], other) for other in found[1:]):
        warn("the adapters lie beside different tokenizers, and none is copied; say with --take N whose is meant")
        return []
    return [(file, name) for name, file in found[0].items()] if found else []


def _files(adapter: Adapter) -> Files:
    path = Path(adapter.meta["path"]) if "path" in adapter.meta else None
    if path is None:
        return {}
    folder = path if path.is_dir() else path.parent
    return {name: folder / name for name in TOKENIZER if (folder / name).is_file()}


def _same(a: Files, b: Files) -> bool:
    return a.keys() == b.keys() and all(_bytes(a[n]) == _bytes(b[n]) for n in a)


def _bytes(file: Path) -> bytes:
    with open(open_regular(file), "rb") as stream:
        return stream.read()
