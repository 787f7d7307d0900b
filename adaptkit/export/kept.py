"""Adapters that stay beside a graph, each in a file of its own that is put in while the graph runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import live
from ..adapter import Adapter
from ..errors import AdaptKitError, Mismatch
from ..store.hub import called
from . import files, slots

NAME = "adaptkit_export"
TIMES = 2  # as much rounding is allowed as without: two more products for each module, and a scale among them
PLAIN = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Kept:
    """adapters: by the names of their files.    numbers: what each puts into the slots.    asked: torch's answers."""

    adapters: dict[str, Adapter]
    numbers: dict[str, slots.Numbers] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    def fitted(self, model: nn.Module) -> slots.Shapes:
        """The slots that the adapters need. Raises Mismatch with the adapter's name for what does not fit."""
        for name, adapter in self.adapters.items():
            try:
                self.numbers[name] = slots.filled(model, adapter)
            except AdaptKitError as e:
                raise e.at(name) from None
        return slots.union(list(self.numbers.values()))

    def ask(self, model: nn.Module, kind: str, names: list[str], say: Any) -> None:
        """Let torch answer with each of the adapters on its model."""
        from .exam import exam

        for name, adapter in self.adapters.items():
            live.attach(model, adapter, name=NAME, freeze=False)
            try:
                made = exam(model, kind, names, lambda text, name=name: say(f"{text} with {name}"))
                self.asked[name] = replace(made, tolerance=TIMES * made.tolerance)
            finally:
                live.detach(model, NAME)

    def write(self, folder: Path, dtype: str) -> dict[str, Path]:
        """A file for each adapter, in the dtype of the graph."""
        made = {}
        for name, numbers in self.numbers.items():
            made[name] = folder / f"{name}{files.SUFFIX}"
            try:
                files.write(made[name], numbers, dtype)
            except AdaptKitError as e:
                raise e.at(name) from None
        return made

    def told(self, name: str) -> dict[str, Any]:
        """What a receipt says of an adapter: how many modules, and the ranks."""
        numbers = self.numbers[name]
        ranks = sorted({v.shape[1] for n, v in numbers.items() if n.endswith(f".{slots.A}")})
        return {"modules": len({slots.site_of(n) for n in numbers}), "ranks": ranks}


def kept(adapters: Sequence[Adapter]) -> Kept:
    """Adapters by names for files: that of the folder or file each is from, numbered where two are the same.

    Raises Mismatch for what no slot can hold, before a model is loaded.
    """
    found: dict[str, Adapter] = {}
    for adapter in adapters:
        name = _name(adapter)
        taken = {n.casefold() for n in found}  # some disks do not tell A from a
        numbered = (f"{name}_{i}" for i in itertools.count(2))
        name = next(n for n in itertools.chain([name], numbered) if n.casefold() not in taken)
        try:
            slots.only_weights(adapter)
        except Mismatch as e:
            raise e.at(name) from None
        found[name] = adapter
    return Kept(found)


def _name(adapter: Adapter) -> str:
    name = Path(called(Path(adapter.meta.get("path", "adapter")).absolute())).name
    stem = name.removesuffix(".safetensors").removesuffix(".bin").removesuffix(files.SUFFIX)
    return PLAIN.sub("_", stem).strip("._-") or "adapter"
