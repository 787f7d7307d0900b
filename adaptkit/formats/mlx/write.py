"""Writing. One rank and one scale for all: smaller ranks are padded with zeros, scales that differ are folded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Mismatch, quoted, some
from ...store.safetensors import load_json
from ..base import Note
from ..fold import chosen, padded, stored, with_scale
from ..save import folder, ordered
from .ends import UNKNOWN, doubtful, tied
from .names import theirs
from .read import EMBEDDINGS

LAYER = re.compile(r"(?:.+\.)?(?:layers|h|blocks)\.\d+\.(?P<rest>.+)")
IMAGES = ("unet.", "transformer.down", "transformer.single", "transformer.transformer_blocks.", "text_encoder")


def write(adapter: Adapter, path: Path, base: Path | None = None, drop: Collection[str] = ()) -> list[Note]:
    """Write a folder with adapter_config.json and adapters.safetensors. Raises Mismatch for what MLX cannot hold."""
    if adapter.whole and not adapter.sites and not drop:
        folder(path, "adapters.safetensors", ordered(adapter.whole), {}, _full(adapter), by="mlx")
        return []
    left = {"embedding"} & set(drop) if tied(base) else set()
    sites, _, notes = chosen(adapter, "mlx", {"embedding", "dora"} - left, drop)
    _fit(sites)
    notes += [Note("kept", p, UNKNOWN) for p in doubtful(sites, base, "--drop embedding leaves it out")]
    names = theirs(sites, base)
    notes += [Note("renamed", p, f"{n} in mlx-lm") for p, n in names.items() if n != p]
    sites = {names[p]: s for p, s in _one_rank(_one_scale(sites, notes), notes).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, site in sites.items():
        tensors |= {f"{name}.lora_a": stored(site.params["A"]).T, f"{name}.lora_b": stored(site.params["B"]).T}
        if "m" in site.params:
            tensors[f"{name}.m"] = stored(site.params["m"]).reshape(-1)
    folder(path, "adapters.safetensors", ordered(tensors), {}, _config(adapter, sites), by="mlx")
    return notes


def _fit(sites: Mapping[str, Site]) -> None:
    if images := [p for p in sites if p.startswith(IMAGES)]:
        text = f"mlx-lm runs language models, {some(images)} {'is' if len(images) == 1 else 'are'} of another"
        raise Mismatch(text, hint="--to diffusers or kohya")
    if len(names := {s.tuner.name for s in sites.values()}) > 1:
        raise Mismatch("mlx holds LoRA or DoRA for all modules, this adapter has both", hint="write them apart")
    for path, site in sites.items():
        if site.tuner.embedding and names == {"dora"}:
            raise Mismatch(f"{quoted(path)} has DoRA on an embedding, which is another DoRA in mlx")
        if site.tuner.embedding != (path.rpartition(".")[2] in EMBEDDINGS):
            raise Mismatch(f"mlx tells embeddings by their names, and {quoted(path)} would be taken for the other kind")


def _one_scale(sites: dict[str, Site], notes: list[Note]) -> dict[str, Site]:
    if len({s.tuner.scale for s in sites.values()}) == 1:
        return sites
    text = "scales differ and mlx has one for all, so this one went into lora_b"
    notes += [Note("folded", p, text) for p, s in sites.items() if s.tuner.scale != 1]
    return {p: with_scale(s, 1.0, p) for p, s in sites.items()}


def _one_rank(sites: dict[str, Site], notes: list[Note]) -> dict[str, Site]:
    r = max(s.tuner.r for s in sites.values())
    notes += [Note("padded", p, f"rank {s.tuner.r} to {r} with zeros") for p, s in sites.items() if s.tuner.r < r]
    return {p: padded(s, r) if s.tuner.r < r else s for p, s in sites.items()}


def _config(adapter: Adapter, sites: Mapping[str, Site]) -> dict[str, Any]:
    """The settings that came with the adapter, or fresh ones, that make mlx-lm put LoRA on these modules."""
    old, one = _old(adapter), next(iter(sites.values())).tuner
    parameters = old.get("lora_parameters") or {}
    scale = parameters.get("scale") if parameters.get("scale", 0) * one.r == one.alpha else None
    # the multiplication is undone exactly only where it was exact
    scale = one.scale if scale is None or one.rslora else scale
    keys = sorted({m["rest"] if (m := LAYER.fullmatch(p)) else p for p in sites})
    made = {"rank": one.r, "scale": scale, "dropout": parameters.get("dropout", one.dropout), "keys": keys}
    kind = "dora" if one.name == "dora" else "lora"
    model = {"model": adapter.meta["base"]} if adapter.meta.get("base") else {}
    return {**model, **old, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": {**parameters, **made}}


def _full(adapter: Adapter) -> dict[str, Any]:
    return {"num_layers": -1, **_old(adapter), "fine_tune_type": "full"}


def _old(adapter: Adapter) -> dict[str, Any]:
    try:
        old = load_json(adapter.meta.get("mlx:config", "{}"))
    except AdaptKitError:
        return {}
    return old if isinstance(old, dict) else {}
