"""What a path holds, by its contents: an adapter of some format, a whole checkpoint, or the shards of a training run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import AdaptKitError, Usage, quoted
from ..formats import base
from ..store import pickles
from ..store.checkpoint import SINGLE
from ..store.safepaths import open_regular
from ..store.shards import kind

WHOLE = ("safetensors", "pytorch")
UNKNOWN = "a program not known here"
# names that only adapters have, by whose they are; the last line is anybody's
STRANGE = {
    "AdapterHub": re.compile(r"\.loras\.|\badapter_(?:down|up)\b|\bcontrol_trans\b"),
    "litgpt": re.compile(r"attn\.(?:attn|qkv)\.lora_[AB]$"),
    "torchtune": re.compile(r"\.lora_[ab]\.weight$"),
    "loralib": re.compile(r"\.lora_[AB]$"),
    "cloneofsimo's lora": re.compile(r"\w+:\d+:(?:up|down)"),
    "ComfyUI": re.compile(r"diffusion_model\..+\.lora_"),
    "textual inversion": re.compile(r"<.+>$|string_to_param\b|emb_params$|clip_[lg]$"),
    UNKNOWN: re.compile(r"\b(?:lora_|lycoris_|oft_|hada_|lokr_|ia3_)|_lora\d*\.|\.lora\.|lora_[abAB]\b"),
}
SHARDED = ("dcp", "deepspeed")
PIECE = re.compile(r".*\.distcp|.*_(?:model|optim)_states\.pt")
ENDINGS = {"safetensors": (".safetensors",), "pytorch": (".bin", ".pth", ".pt")}
OTHERS = {b"GGUF": "it is a whole model in GGUF", b"\x89HDF": "it is HDF5, as Keras writes it"}  # by their first bytes
NOT_TORCH = (".gguf", ".onnx_adapter", ".npz")
WEIGHTS = (*NOT_TORCH, *(s for found in ENDINGS.values() for s in found))
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def detect(path: Path) -> str:
    """The name of what is there: a registered format, "safetensors", "pytorch", "dcp" or "deepspeed".

    Raises Usage when nothing is there, when it is nothing known, or when it may be read in two ways.
    """
    if not path.exists():
        raise Usage("not found", where=path, hint="give a folder or a file")
    if path.is_file() and PIECE.fullmatch(path.name):
        raise Usage(
            "is a piece of a checkpoint in shards, which says nothing alone", where=path, hint="give its folder"
        )
    found = candidates(path)
    if not found:
        why, hint = _held(path)
        raise Usage(f"is nothing that can be converted ({why})", where=path, hint=hint)
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
    for name, kinds in ENDINGS.items():
        files = [n for n in names if n.endswith(kinds) and not n.startswith(("adapter_", "optimizer", "training_args"))]
        files = [n for n in files if not n.startswith(("rng_state", "scheduler")) and not n.endswith("_states.pt")]
        alone = len(files) == 1 and not any(n.endswith(NOT_TORCH) for n in names)
        if files and ("config.json" in names or any(n.endswith(".index.json") for n in names) or alone):
            return name
    return None


def strange(names: Iterable[str]) -> tuple[str, list[str]]:
    """Whose adapter it is, of a format that is not installed or not recognised, and the names that tell; "" for a model."""
    names = list(names)
    for program, pattern in STRANGE.items():
        if found := [n for n in names if pattern.search(n)]:
            return program, found
    return "", []


def _of_file(path: Path) -> str | None:
    """By its contents; an empty or cut file by its ending, so that whoever reads it says what is wrong."""
    try:
        fd = open_regular(path)
    except AdaptKitError:
        return None
    with open(fd, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= min(100_000_000, path.stat().st_size - 8):
        return "safetensors"
    if pickles.is_pickle(path):
        return "pytorch"
    return next((name for name, ends in ENDINGS.items() if path.name.endswith(ends)), None)


def _held(path: Path) -> tuple[str, str]:
    """What is there instead, and what to do."""
    if path.is_file():
        with open(path, "rb") as file:
            known = OTHERS.get(file.read(4))
        hint = "give what it was made from" if known else "say what it is with --from"
        return known or f"it ends in {path.suffix or 'nothing'}", hint
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return "it is empty", "give a folder with weights"
    hint = "give one of its files" if any(n.endswith(WEIGHTS) for n in names) else "give the folder or file itself"
    return f"it holds {', '.join(quoted(n) for n in names[:3])}{' ...' if len(names) > 3 else ''}", hint
