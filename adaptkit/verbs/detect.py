"""What a path holds, by its contents: an adapter of some format, a whole checkpoint, or the shards of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import AdaptKitError, Usage
from ..formats import base
from ..store import pickles
from ..store.checkpoint import SINGLE
from ..store.safepaths import open_regular
from ..store.shards import kind

WHOLE = ("safetensors", "pytorch")
# names that only adapters have, whoever wrote them
STRANGE = re.compile(
    r"\b(?:lora_|lycoris_|oft_|hada_|lokr_|ia3_)|_lora\.|\.lora\.|\.loras?\.|lora_[abAB]\b|adapter_(?:down|up)"
)
SHARDED = ("dcp", "deepspeed")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def detect(path: Path) -> str:
    """The name of what is there: a registered format, "safetensors", "pytorch", "dcp" or "deepspeed".

    Raises Usage when nothing is there, when it is nothing known, or when it may be read in two ways.
    """
    if not path.exists():
        raise Usage("not found", where=path, hint="give a folder or a file")
    found = candidates(path)
    if not found:
        raise Usage(f"is nothing that can be converted ({_held(path)})", where=path, hint="say what it is with --from")
    if len(found) > 1:
        raise Usage(f"can be read as {' and as '.join(found)}", where=path, hint=f"choose with --from {found[0]}")
    return found[0]


def candidates(path: Path) -> list[str]:
    """Everything a path may be. An adapter beside the shards it was made from is the adapter."""
    adapters, model = base._fitting(path), container(path)
    if path.is_file() and adapters:
        return adapters  # an adapter's file is a weight file as well
    if adapters and path.is_dir() and not (path / "config.json").is_file():
        return adapters if _weighty(path) or not kind(path) else [kind(path)]
    if adapters and model and not _weighty(path):
        adapters = [a for a in adapters if a != "peft"]  # adapter_config.json alone, beside a model
    found = adapters + ([model] if model else [])
    shards = kind(path)
    if shards and not (found and (_weighty(path) or any((path / n).is_file() for n in SINGLE))):
        return [shards]
    return found


def _weighty(path: Path) -> bool:
    """Whether a folder holds an adapter's weights, and not just its settings."""
    return any((path / name).is_file() for name in ADAPTERS)


def container(path: Path) -> str | None:
    """The container of a whole checkpoint: "safetensors", "pytorch", or None."""
    if path.is_file():
        return _of_file(path)
    names = {p.name for p in path.iterdir()}
    for name, kinds in (("safetensors", (".safetensors",)), ("pytorch", (".bin", ".pth", ".pt"))):
        files = [n for n in names if n.endswith(kinds) and not n.startswith(("adapter_", "optimizer", "training_args"))]
        files = [n for n in files if not n.startswith(("rng_state", "scheduler")) and not n.endswith("_states.pt")]
        if files and ("config.json" in names or any(n.endswith(".index.json") for n in names) or len(files) == 1):
            return name
    return None


def strange(names: Iterable[str]) -> list[str]:
    """Names that are an adapter's, of a format that is not installed or not recognised."""
    return [n for n in names if STRANGE.search(n)]


def _of_file(path: Path) -> str | None:
    try:
        fd = open_regular(path)
    except AdaptKitError:
        return None
    with open(fd, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= min(100_000_000, path.stat().st_size - 8):
        return "safetensors"
    return "pytorch" if pickles.is_pickle(path) else None


def _held(path: Path) -> str:
    if path.is_file():
        return f"it ends in {path.suffix or 'nothing'}"
    names = sorted(p.name for p in path.iterdir())
    return "it is empty" if not names else f"it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
