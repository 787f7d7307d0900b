"""The two directions behind one door."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...adapter import Adapter
from ..base import Format, Note
from ..files import names
from .names import PREFIXES
from .read import read
from .write import write


class Kohya(Format):
    """kohya and LyCORIS' LoCon: one .safetensors for SD, SDXL, SD 3 or FLUX."""

    name = "kohya"
    suffix = ".safetensors"
    cannot = (
        "models other than SD 1, SD 2, SDXL, SD 3 and FLUX",
        "rsLoRA as such (its root goes into alpha)",
        "LoRA on embeddings",
        "trained biases, token rows and tensors replaced outright",
        "IA3, prompts, prefixes",
    )

    def sniff(self, path: Path) -> bool:
        found = names(path)
        return bool(found) and all(n.startswith((*PREFIXES, "oft_unet_", "bundle_emb.")) for n in found)

    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        return read(path)

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = ()
    ) -> list[Note]:
        return write(adapter, path, base, drop)
