"""The two directions behind one door."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...adapter import Adapter
from ..base import Format, Note
from ..files import names
from .keys import is_one
from .read import FILES, read
from .write import write


class Diffusers(Format):
    """diffusers: pytorch_lora_weights.safetensors, for a pipeline or one of its components."""

    name = "diffusers"
    suffix = ".safetensors"
    cannot = (
        "modules that no pipeline has",
        "LoRA on embeddings",
        "trained biases, token rows and tensors replaced outright",
        "IA3, prompts, prefixes",
    )

    def sniff(self, path: Path) -> bool:
        return is_one(names(path, *FILES))

    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        return read(path)

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = ()
    ) -> list[Note]:
        return write(adapter, path, drop)
