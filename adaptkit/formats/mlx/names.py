"""Module paths in mlx-lm: transformers' own, but for GPT-2 and GPT-NeoX, where all begins with `model.h`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapter import Site
from ...store.checkpoint import read_json

GPT2 = re.compile(r"transformer\.(?P<rest>h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)|wte|wpe)")
NEOX = re.compile(r"gpt_neox\.(?:layers(?P<layer>\.\d+\..+)|(?P<rest>embed_in))")
BACK = (  # mlx-lm's path, transformers'
    (re.compile(r"model\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)"), r"transformer.\1"),
    (re.compile(r"model\.h(\.\d+\.(?:attention|mlp)\..+)"), r"gpt_neox.layers\1"),
    (re.compile(r"model\.embed_in"), "gpt_neox.embed_in"),
    (re.compile(r"model\.embed_out"), "embed_out"),
)


def theirs(sites: Mapping[str, Site], base: Path | None) -> dict[str, str]:
    """The path of each site in mlx-lm. GPT-2 is told from GPT-BigCode, which keeps its names, by its weights' order."""
    kind = settings(base).get("model_type") or _told(sites)
    if kind == "gpt2":
        return {p: f"model.{found['rest']}" if (found := GPT2.fullmatch(p)) else p for p in sites}
    if kind == "gpt_neox":
        return {p: _neox(p) for p in sites}
    return {p: p for p in sites}


def ours(path: str) -> str:
    """transformers' path of a module of mlx-lm."""
    return next((pattern.sub(to, path) for pattern, to in BACK if pattern.fullmatch(path)), path)


def is_turned(path: str) -> bool:
    """Whether transformers stores the weight as (in, out): GPT-2's Conv1D."""
    return bool((found := GPT2.fullmatch(path)) and found["rest"].startswith("h."))


def _neox(path: str) -> str:
    if found := NEOX.fullmatch(path):
        return f"model.h{found['layer']}" if found["layer"] else f"model.{found['rest']}"
    return "model.embed_out" if path == "embed_out" else path


def settings(base: Path | None) -> dict[str, Any]:
    """The base's config.json; empty where there is none."""
    file = base / "config.json" if base is not None else None
    return read_json(file) if file is not None and file.is_file() else {}


def _told(sites: Mapping[str, Site]) -> str | None:
    if any(is_turned(p) and s.tuner.transposed for p, s in sites.items()):
        return "gpt2"
    return "gpt_neox" if any(map(NEOX.fullmatch, sites)) else None
