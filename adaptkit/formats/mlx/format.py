"""The two directions behind one door."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...adapter import Adapter
from ...errors import AdaptKitError
from ...store.checkpoint import read_json
from ..base import Format, Note
from .read import CONFIG, WEIGHTS, read
from .write import write

MARKS = ("fine_tune_type", "lora_parameters")


class Mlx(Format):
    """MLX (mlx-lm): adapter_config.json beside adapters.safetensors or .npz."""

    name = "mlx"
    cannot = (
        "a scale or a rank for each module (folded and padded, which changes nothing)",
        "LoRA and DoRA in one adapter, DoRA on embeddings",
        "LoRA on convolutions",
        "trained biases and token rows; tensors replaced outright beside LoRA",
        "IA3, prompts, prefixes",
    )

    def sniff(self, path: Path) -> bool:
        folder = path if path.is_dir() else path.parent
        if path.is_file() and path.name not in (CONFIG, *WEIGHTS):
            return False
        if not (folder / CONFIG).is_file():
            return path.is_file() and path.name in WEIGHTS or (path / "adapters.npz").is_file()
        try:
            config = read_json(folder / CONFIG)
        except (AdaptKitError, OSError):
            return False
        return "peft_type" not in config and any(m in config for m in MARKS)

    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        return read(path, base)

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = ()
    ) -> list[Note]:
        return write(adapter, path, base, drop)
