"""Which model an adapter is for, hence how its modules are spelled: told by what was read, the base, or the modules."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Mismatch
from ...store.checkpoint import read_json

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PIPELINES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "diffusers", "Flux": "flux"}
WIDTHS = {768: "diffusers", 1024: "diffusers", 2048: "sdxl"}  # of the text that a UNet attends to
STARTS = {"unet": ("down_blocks.", "up_blocks.", "mid_block."), "transformer": ("transformer_blocks.", "single_")}


@dataclass(frozen=True)
class Home:
    """Where a component's names begin, and the space they are looked up in."""

    prefix: str
    space: str


def homes(adapter: Adapter, sites: Mapping[str, Site], base: Path | None) -> tuple[dict[str, Home], str]:
    """A Home for each component that the adapter has, "" for sites without one, and the denoiser's space."""
    parts = {_component(path) for path in sites}
    space = adapter.meta.get("kohya/space") or _of_base(base) or _of_sites(sites, parts)
    prefixes = _prefixes(space, parts) | json.loads(adapter.meta.get("kohya/prefixes", "{}"))
    found = {}
    for part in parts:
        if part in ENCODERS:
            t5 = prefixes[part] == "lora_te3_"
            found[part] = Home(prefixes[part], "t5" if t5 else "clip")
        else:
            found[part] = Home(prefixes.get(part or _bare(sites), "lora_unet_"), space)
    return found, space


def _component(path: str) -> str:
    start = path.partition(".")[0]
    return start if start in (*ENCODERS, "unet", "transformer") else ""


def _bare(sites: Mapping[str, Site]) -> str:
    return next((c for c, starts in STARTS.items() if any(p.startswith(starts) for p in sites)), "unet")


def _prefixes(space: str, parts: Collection[str]) -> dict[str, str]:
    """SD 1 and 2 have one text encoder, SDXL two, FLUX's second and SD 3's third is a T5."""
    many = space in ("sdxl", "flux", "flux-diffusers", "sd3") or "text_encoder_2" in parts
    found = {"text_encoder": "lora_te1_" if many else "lora_te_", "text_encoder_2": "lora_te2_"}
    found |= {"text_encoder_3": "lora_te3_", "unet": "lora_unet_", "transformer": "lora_unet_"}
    return found | ({"text_encoder_2": "lora_te3_"} if space.startswith("flux") else {})


def _of_base(base: Path | None) -> str | None:
    """The space of a pipeline or of its denoiser, by its own settings."""
    if base is None:
        return None
    index = _json(Path(base) / "model_index.json")
    name = str(index.get("_class_name", ""))
    if found := next((s for start, s in PIPELINES.items() if name.startswith(start)), None):
        return found
    config = _json(Path(base) / "config.json")
    if str(config.get("_class_name", "")).startswith("Flux"):
        return "flux"
    if str(config.get("_class_name", "")).startswith("SD3"):
        return "sd3"
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "diffusers" if str(config.get("_class_name", "")).startswith("UNet2D") else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (AdaptKitError, OSError):
        return {}


def _of_sites(sites: Mapping[str, Site], parts: set[str]) -> str:
    """The space that the modules tell. Raises Mismatch when they fit several models."""
    paths = [p.removeprefix(_component(p)).removeprefix(".") for p in sites]
    if any(p.startswith("single_transformer_blocks.") for p in paths):
        return "flux"
    if any(p.startswith(("transformer_blocks.", "joint_blocks.")) for p in paths):
        return _of_transformer(paths)
    unet = [p for p in paths if p.startswith(STARTS["unet"])]
    if not unet:
        return "sdxl" if "text_encoder_2" in parts else "diffusers"
    if "text_encoder_2" in parts or any("transformer_blocks.1." in p for p in unet):
        return "sdxl"
    if any(p.startswith(("down_blocks.3.", "up_blocks.3.", "down_blocks.0.attentions.")) for p in unet):
        return "diffusers"
    widths = {_width(s) for p, s in sites.items() if p.endswith(("attn2.to_k", "attn2.to_v"))} & set(WIDTHS)
    if widths:
        return WIDTHS[min(widths)]
    if "text_encoder" in parts:
        return "diffusers"
    raise Mismatch("cannot tell whether the adapter is for SD 1, SD 2 or SDXL, whose names differ", hint="give --base")


def _of_transformer(paths: list[str]) -> str:
    if any(p.startswith("joint_blocks.") for p in paths):
        return "sd3"
    raise Mismatch("cannot tell whether the adapter is for SD 3 or FLUX, whose names differ", hint="give --base")


def _width(site: Site) -> int:
    return site.params["A"].shape[1] if len(site.params["A"].shape) == 2 else 0
