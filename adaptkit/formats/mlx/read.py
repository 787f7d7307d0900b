"""Reading. One scale for the whole file: the multiplier itself, not divided by the rank."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ... import registry
from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from ...store import safetensors
from ...store.arrays import FLOATS, dtype_of
from ...store.checkpoint import read_json, warn
from ..fold import turned
from .ends import UNKNOWN, doubtful
from .names import is_turned, ours

CONFIG = "adapter_config.json"
WEIGHTS = ("adapters.safetensors", "adapters.npz")
LETTERS = {"lora_a": "A", "lora_b": "B", "m": "m"}
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embed_positions", "wpe")
ADD = 'write {"fine_tune_type": "lora", "lora_parameters": {"scale": ...}} to adapter_config.json beside it'


def read(path: Path, base: Path | None = None) -> Adapter:
    """The adapter in a folder, or in the folder of a weight file. Raises Mismatch where the scale is not known."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() and path.name != CONFIG else _weights(folder)
    if not (folder / CONFIG).exists():
        hint = f"{ADD}: 20.0 was usual, 2.0 in the first example"
        raise Mismatch("does not hold its scale, and there is no adapter_config.json", where=file.name, hint=hint)
    config = read_json(folder / CONFIG)
    try:
        adapter = assemble(config, _values(file))
        if unsure := doubtful(adapter.sites, base, "fuse it with mlx-lm"):
            warn(f"LoRA on {some(unsure)}: {UNKNOWN}")
    except AdaptKitError as e:
        raise e.at(file.name) from None
    adapter.meta |= {"mlx:config": json.dumps(config, sort_keys=True), "base": str(config.get("model") or "")}
    return adapter


def _weights(folder: Path) -> Path:
    found = next((folder / w for w in WEIGHTS if (folder / w).is_file()), None)
    if found is None:
        raise Corrupt(
            f"holds {CONFIG} but no weights ({' or '.join(WEIGHTS)})", where=folder.name, hint="fetch it again"
        )
    return found


def _values(file: Path) -> dict[str, Any]:
    if file.suffix != ".npz":
        return dict(safetensors.read(file)[0])
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {n: arrays[n] for n in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as e:
        raise Corrupt(f"is no sound .npz file ({quoted(e)})") from None


def assemble(config: dict[str, Any], values: dict[str, Any]) -> Adapter:
    """An adapter from the settings and the tensors, each used or refused."""
    if not values:
        raise Mismatch("holds no tensors", hint="was it saved from a sharded run?")
    if config.get("fine_tune_type") == "full":
        return Adapter(whole=dict(values))
    scale, rank, dropout = _numbers(config)
    modules: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in LETTERS or not path:
            hint = "is it damaged, or of another program?"
            raise Mismatch(f"{quoted(name)} is no part of a LoRA that MLX reads", hint=hint)
        if dtype_of(value) not in FLOATS or getattr(value.dtype, "kind", "f") not in "fV":
            raise Mismatch(f"{quoted(name)} has dtype {value.dtype}, adapters hold F32, F16 or BF16")
        modules.setdefault(path, {})[LETTERS[leaf]] = value
    adapter = Adapter({ours(path): _site(path, parts, scale, rank) for path, parts in modules.items()})
    for site in adapter.sites.values():
        site.tuner = replace(site.tuner, dropout=dropout)
    return adapter


def _numbers(config: dict[str, Any]) -> tuple[float, int | None, float]:
    """The scale, the rank where the settings say it, and the dropout of training."""
    settings = config.get("lora_parameters") or {}
    if not isinstance(settings, dict):
        raise Corrupt(f"lora_parameters is a {type(settings).__name__}, an object is expected", where=CONFIG)
    scale, rank = settings.get("scale"), settings.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise Mismatch(f"lora_parameters.scale is {quoted(repr(scale))}, a number is expected", where=CONFIG, hint=ADD)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise Corrupt(f"lora_parameters.rank is {quoted(repr(rank))}, which no adapter has", where=CONFIG)
    dropout = settings.get("dropout")
    known = isinstance(dropout, (int, float)) and not isinstance(dropout, bool) and 0 <= dropout < 1
    return float(scale), rank, float(dropout) if known else 0.0


def _site(path: str, parts: dict[str, Any], scale: float, rank: int | None) -> Site:
    if not {"A", "B"} <= set(parts):
        lack = "lora_a" if "A" not in parts else "lora_b"
        raise Mismatch(f"{quoted(path)} has no {lack}; the module is incomplete", hint="fetch it again")
    if ".attention.w" in f".{path}":
        raise Mismatch(
            f"{quoted(path)} is named as in the first example of MLX, whose rotary layout no other program has"
        )
    a, b = parts["A"].shape, parts["B"].shape
    if len(a) == 3:
        raise Mismatch(f"{quoted(path)} adapts {a[0]} experts at once, which have other names outside MLX")
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or not a[1]:
        raise Mismatch(f"{quoted(path)}: lora_a {list(a)} and lora_b {list(b)} do not fit each other")
    if rank not in (None, a[1]):
        raise Mismatch(f"lora_a of {quoted(path)} has rank {a[1]}, adapter_config.json says {rank}")
    embedding = path.rpartition(".")[2] in EMBEDDINGS
    if embedding and "m" in parts:
        raise Mismatch(f"{quoted(path)} has DoRA by token, no other program has it on embeddings")
    conv1d = ours(path) != path and is_turned(ours(path))
    more = {"transposed": embedding or conv1d, "embedding": embedding}
    params = {"A": turned(parts["A"]), "B": turned(parts["B"]), **{k: v for k, v in parts.items() if k == "m"}}
    tuner = registry.load("tuners", "dora" if "m" in parts else "lora")
    return Site(tuner(r=a[1], alpha=scale * a[1], **more), params)
