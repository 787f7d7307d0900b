"""The two directions behind one door, and which files and folders are PEFT's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ... import registry
from ...adapter import Adapter
from ...errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from ...store import pickles
from ...store.checkpoint import Checkpoint, read_json, read_weights, warn
from ...store.entry import Entry
from ...store.shards import nearby
from ..base import Format, Note
from . import state
from .assemble import assemble
from .config import read_config, whose
from .write import write

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # the last one is torchtune's


class Peft(Format):
    """PEFT: adapter_config.json beside adapter_model.safetensors or .bin."""

    name = "peft"
    cannot = (
        "tuners of two kinds in one folder",
        "another dropout for each module",
        "KaSA and BD-LoRA, which are only read",
    )

    def sniff(self, path: Path) -> bool:
        if path.is_file():
            return path.name in WEIGHTS and not _foreign(path.parent)
        path = _inner(path)
        if (path / "config.json").exists() and not (path / CONFIG).exists():
            return False
        return not _foreign(path) and ((path / CONFIG).exists() or any((path / w).exists() for w in WEIGHTS))

    def adapted(self, entries: Mapping[str, Entry]) -> list[str]:
        """The names among the tensors of a training run that are an adapter's."""
        return state.adapted(entries)

    def taken(self, checkpoint: Checkpoint, settings: Path) -> tuple[Adapter, list[str]]:
        """The adapter among the tensors of a training run, and the names that are not its own."""
        return state.taken(checkpoint, settings)

    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        return self.settled(path)

    def settled(self, path: Path, settings: Path | None = None) -> Adapter:
        """The adapter at a path, with the settings in another file than the one beside it. Raises what reading does."""
        path = _inner(path)
        folder = path if path.is_dir() else path.parent
        settings = settings or folder / CONFIG
        if not settings.exists():
            hint = "put it beside the weights, or give adaptkit convert --config"
            raise Corrupt("not found, and without it the scale of the update is unknown", where=CONFIG, hint=hint)
        config = read_config(settings)
        file = path if path.is_file() else _weights(folder)
        entries, metadata = read_weights(file)
        if file.suffix != ".safetensors":
            pickles.check_crc(file)
        try:
            _numbered(entries, folder)
            adapter = assemble(config, entries)
        except AdaptKitError as e:
            raise e.at(file.name) from None
        adapter.meta |= {"path": str(folder), "base": str(config.get("base_model_name_or_path") or "")}
        adapter.meta |= {f"peft:{k}": v for k, v in metadata.items()}
        return adapter

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = (), **how: Any
    ) -> list[Note]:
        return write(adapter, path, drop=drop, **how)


def _inner(path: Path) -> Path:
    """The only adapter in a folder: PEFT saves one whose name is not "default" in a folder of that name."""
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, "config.json", *WEIGHTS)):
        return path
    found = [p for p in path.iterdir() if (p / CONFIG).is_file() and any((p / w).is_file() for w in WEIGHTS)]
    return found[0] if len(found) == 1 else path


def _foreign(folder: Path) -> bool:
    """Whether the settings are those of another installed format that uses the same file name."""
    try:
        other = whose(read_json(folder / CONFIG)) or ""
    except AdaptKitError:
        return False  # damaged or not there: reading says which
    return other.lower() in registry.names("formats")


def _numbered(entries: Mapping[str, Entry], folder: Path) -> None:
    """Raises Mismatch for tensors without numbers, which ZeRO-3 writes when nobody gathers the weights."""
    empty = [name for name, e in entries.items() if not e.numel]
    if not empty:
        return
    name = nearby(folder)
    where = f"{folder.name}/{name}" if name else "the run's shards (global_step*/ or pytorch_model_fsdp_0/)"
    raise Mismatch(
        f"{len(empty)} of {len(entries)} tensors hold no numbers ({some(empty, 1)}): it was saved from a sharded run, and "
        f"the numbers are in {quoted(where)}",
        hint=f"adaptkit convert {quoted(where) if name else 'SHARDS'} --to peft",
    )


def _weights(folder: Path) -> Path:
    found = [folder / w for w in WEIGHTS if (folder / w).exists()]
    if not found:
        name = nearby(folder)
        raise Corrupt(
            f"holds {CONFIG} but no weights ({' or '.join(WEIGHTS[:2])})",
            where=folder.name,
            hint=f"the numbers are in {quoted(name)}: adaptkit convert --to peft" if name else "fetch it again",
        )
    if len(found) > 1:
        warn(f"{folder.name} holds {found[0].name} and {found[1].name}; the first is read")
    return found[0]
