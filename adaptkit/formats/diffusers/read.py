"""Reading: the scale is in the file's metadata, in old files in alpha tensors, and 1 where neither says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ... import registry
from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Corrupt, Mismatch, quoted
from ...store.arrays import FLOATS, load
from ...store.checkpoint import warn
from ...store.entry import Entry
from ...store.safetensors import load_json
from ..files import tensors
from ..peft.patterns import lookup
from .keys import component, parse

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
SETTINGS = "lora_adapter_metadata"
Parts = dict[str, Entry]
Config = dict[str, Any]


def read(path: Path) -> Adapter:
    """The adapter in a file. Raises Mismatch for a tensor that has no place."""
    entries, metadata, file = tensors(path, *FILES)
    try:
        adapter = assemble(entries, metadata)
    except AdaptKitError as e:
        raise e.at(file.name) from None
    adapter.meta |= {f"diffusers:{k}": v for k, v in metadata.items()}
    return adapter


def assemble(entries: dict[str, Entry], metadata: dict[str, str]) -> Adapter:
    """Sites by module path, with the component before it, from tensors and metadata."""
    modules: dict[str, Parts] = {}
    for name, entry in entries.items():
        path, letter = parse(name) or _foreign(name)
        if entry.dtype not in FLOATS and letter != "alpha":
            raise Mismatch(f"{quoted(name)} has dtype {entry.dtype}, adapters hold F32, F16, BF16 or F64")
        if letter in modules.setdefault(path, {}):
            raise Corrupt(f"{quoted(name)} is given twice, under two spellings")
        modules[path][letter] = entry
    configs = settings(metadata)
    silent = not configs and "adaptkit" not in metadata.get("software", "")
    if silent and not any("alpha" in parts for parts in modules.values()):
        warn("the file does not say its alpha, so its scale is taken as 1, as diffusers takes it")
    return Adapter({path: _site(path, parts, configs.get(component(path), {})) for path, parts in modules.items()})


def _foreign(name: str) -> tuple[str, str]:
    hint = "is it damaged, or of another program?"
    raise Mismatch(f"{quoted(name)} is no part of a LoRA that diffusers reads", hint=hint)


def settings(metadata: dict[str, str]) -> dict[str, Config]:
    """PEFT's settings for each component; "" for a file of one alone. Raises Corrupt."""
    if SETTINGS not in metadata:
        return {}
    found = load_json(metadata[SETTINGS])
    if not isinstance(found, dict):
        raise Corrupt(f"{SETTINGS} is a JSON {type(found).__name__}, an object is expected")
    configs: dict[str, Config] = {}
    for key, value in found.items():
        home = component(key)
        configs.setdefault(home, {})[key.removeprefix(f"{home}.") if home else key] = value
    for config in configs.values():
        _checked(config)
    return configs


REFUSED = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "arrow_config")


def _checked(config: Config) -> None:
    for key in ("r", "lora_alpha"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Corrupt(f"{SETTINGS}: {key} is {quoted(repr(value))}, a number is expected")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in value.values()):
            raise Corrupt(f"{SETTINGS}: {key} is {quoted(repr(value))}, numbers by name are expected")
    if on := next((k for k in REFUSED if config.get(k)), None):
        raise Mismatch(f"{SETTINGS}: {on} is set, which is not supported")


def _site(path: str, parts: Parts, config: Config) -> Site:
    for have, lack in (("A", "B"), ("B", "A")):
        if have in parts and lack not in parts:
            raise Mismatch(
                f"{quoted(path)} has lora_{have} but no lora_{lack}; it is incomplete", hint="fetch it again"
            )
    if "A" not in parts:
        raise Mismatch(f"{quoted(path)} has {', '.join(sorted(parts))} but no factors", hint="fetch it again")
    A, B = parts["A"].shape, parts["B"].shape
    if len(A) < 2 or len(B) != len(A) or A[0] != B[1] or not A[0]:
        raise Mismatch(f"{quoted(path)}: lora_A {list(A)} and lora_B {list(B)} do not fit each other")
    name = "dora" if "m" in parts else "lora"
    more = tuner_settings(path, A[0], config) | ({"alpha": _alpha(path, parts["alpha"])} if "alpha" in parts else {})
    params = {k: v for k, v in parts.items() if k != "alpha"}
    return Site(registry.load("tuners", name)(**more), params)


def tuner_settings(path: str, r: int, config: Config) -> dict[str, Any]:
    """r, alpha and rslora of a module. Without settings alpha is r, so that the scale is 1."""
    if not config:
        return {"r": r, "alpha": float(r)}
    rank = lookup(config.get("rank_pattern"), path, config.get("r", r), *_names(path))
    if rank != r:
        raise Mismatch(f"{SETTINGS}: r={rank}, but lora_A of {quoted(path)} has rank {r}: the scale would be wrong")
    alpha = lookup(config.get("alpha_pattern"), path, config.get("lora_alpha", r), *_names(path))
    return {"r": r, "alpha": float(alpha), "rslora": bool(config.get("use_rslora"))}


def _names(path: str) -> tuple[str, str]:
    """What else a pattern may call a module: its path in the component, CLIP in either spelling."""
    inner = path.removeprefix(f"{component(path)}.")
    return inner, inner.removeprefix("text_model.")


def _alpha(path: str, entry: Entry) -> float:
    values = load(entry).astype("f8").reshape(-1)
    if values.size != 1 or not np.isfinite(values).all():
        raise Corrupt(f"the alpha of {quoted(path)} is {quoted(values.tolist())}, one number is expected")
    return float(values[0])
