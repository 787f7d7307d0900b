"""A case: one bad or odd input, and how AdaptKit must answer it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import sound

CODES = {"ok": 0, "warn": 0, "usage": 2, "corrupt": 3, "mismatch": 4, "unsafe": 5}
WEIGHTS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
ADAPTER, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"


@dataclass
class Room:
    """The folders of one case and the command to run on them: sound until a case spoils them.

    new: what the run may create below root.      expect: the tensors that a run with exit code 0 must write.
    plant: put root on the import path, so that a module named by an input could be imported.
    copied: files of the base that the output must hold unchanged.
    """

    root: Path
    base: Path
    adapter: Path
    out: Path
    cwd: Path
    options: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=lambda: ["out"])
    expect: sound.Tensors = field(default_factory=lambda: sound.merged(sound.base(), sound.adapter()))
    plant: bool = False
    copied: list[str] = field(default_factory=list)

    @property
    def argv(self) -> list[str]:
        return ["merge", str(self.base), str(self.adapter), "-o", str(self.out), *self.options]

    @property
    def marker(self) -> Path:
        """The file that a payload creates when it is run."""
        return self.root / "MARKER"

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    def shard(self, number: int) -> Path:
        return self.base / sound.shard_name(number)

    def write_model(self, tensors: sound.Tensors, expect: sound.Tensors | None = None) -> None:
        """Another single-file model; by default its exact merge is expected."""
        (self.base / WEIGHTS).write_bytes(sound.packed(tensors))
        self.expect = sound.merged(tensors, sound.adapter()) if expect is None else expect

    def write_shards(self, shards: dict[str, sound.Tensors]) -> None:
        for name, part in shards.items():
            (self.base / name).write_bytes(sound.packed(part))
        self.write_index(sound.index_of(shards))

    def write_index(self, index: object) -> None:
        (self.base / INDEX).write_text(json.dumps(index))

    def change_index(self, **weight_map: object) -> None:
        """Change entries of the weight map; a dot in a tensor's name is spelled as it is, through ** of a dict."""
        index = json.loads((self.base / INDEX).read_text())
        index["weight_map"].update(weight_map)
        self.write_index(index)

    def change_config(self, **changes: object) -> None:
        _change(self.base / "config.json", changes)

    def write_adapter(self, tensors: sound.Tensors, expect: sound.Tensors | None = None) -> None:
        """Another adapter file; by default its exact merge into the sound model is expected."""
        (self.adapter / ADAPTER).write_bytes(sound.packed(tensors))
        self.expect = sound.merged(sound.base(), tensors) if expect is None else expect

    def change_adapter(self, **changes: object) -> None:
        """Change keys of adapter_config.json; `...` takes a key away."""
        _change(self.adapter / "adapter_config.json", changes)


def _change(path: Path, changes: dict[str, object]) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}, indent=2))


Build = Callable[[Room], None]


@dataclass(frozen=True)
class Case:
    """id, a sentence, the demanded answer (a key of CODES) and the function that spoils a sound room."""

    id: str
    text: str
    must: str
    spoil: Build
    layout: str = "single"

    @property
    def code(self) -> int:
        return CODES[self.must]

    def make(self, root: Path) -> Room:
        """Write the folders of this case below `root`."""
        room = sound_room(root, self.layout)
        self.spoil(room)
        return room


CASES: dict[str, Case] = {}


def case(name: str, text: str, must: str, layout: str = "single") -> Callable[[Build], Build]:
    """Enter the decorated function into the table."""

    def enter(spoil: Build) -> Build:
        assert name not in CASES, name
        CASES[name] = Case(name, text, must, spoil, layout)
        return spoil

    return enter


def sound_room(root: Path, layout: str = "single") -> Room:
    """A sound model, as one file or in three shards, next to a sound adapter."""
    room = Room(root, root / "base", root / "adapter", root / "out", cwd=root)
    room.base.mkdir(parents=True)
    room.adapter.mkdir()
    (room.base / "config.json").write_text(json.dumps(sound.CONFIG, indent=2))
    (room.adapter / "adapter_config.json").write_text(json.dumps(sound.ADAPTER_CONFIG, indent=2))
    (room.adapter / ADAPTER).write_bytes(sound.packed(sound.adapter()))
    if layout == "single":
        (room.base / WEIGHTS).write_bytes(sound.packed(sound.base()))
    else:
        room.write_shards(sound.in_shards(sound.base()))
    return room
