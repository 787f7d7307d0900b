"""Flat names and module paths: lora_unet_double_blocks_0_img_attn_qkv is transformer.transformer_blocks.0.attn.to_q, ...

Flattening loses the difference between "." and "_", so names are looked up among the modules that exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from .places import CLIP, SPACES, T5, Place

NUMBER = re.compile(r"(?<![^_.])(?:\d+|#)(?![^_.])")
DENOISER = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_")
ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
PREFIXES = (*DENOISER, *ENCODERS)
COMPONENTS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


@dataclass(frozen=True)
class Found:
    """A module of the script: its name space, and its modules in diffusers, without the component."""

    space: str
    paths: tuple[str, ...]
    cut: str = ""


def prefix_of(flat: str) -> str | None:
    """The prefix of a flat name; None for a name of another program."""
    return next((p for p in PREFIXES if flat.startswith(p)), None)


def find(prefix: str, name: str) -> Found | None:
    """The module behind a flat name without its prefix; None if no known model has it."""
    spaces = {"clip": CLIP, "t5": T5} if prefix in ENCODERS else SPACES
    for space in spaces:
        for place in _by_shape(space).get(_shape(name), ()):
            if (numbers := _numbers(place.theirs, name)) is not None:
                return Found(space, tuple(_filled(p, numbers) for p in place.ours), place.cut)
    return None


def flat(space: str, path: str) -> tuple[str, int, Place, tuple[str, ...]] | None:
    """The flat name of a diffusers module, which of the name's modules it is, the place, and all its modules."""
    for place, index in _by_ours(space).get(NUMBER.sub("#", path), ()):
        if (numbers := _numbers(place.ours[index], path)) is not None:
            name = _filled(place.theirs, numbers).replace(".", "_")
            return name, index, place, tuple(_filled(p, numbers) for p in place.ours)
    return None


def component(prefix: str, space: str, flux: bool) -> str:
    """The part of a pipeline that a name belongs to. flux: whether its T5 is the second encoder rather than the third."""
    if prefix == "lora_te3_":
        return "text_encoder_2" if flux else "text_encoder_3"
    if prefix in COMPONENTS:
        return COMPONENTS[prefix]
    return "unet" if space in ("diffusers", "sdxl") else "transformer"


def _places(space: str) -> list[Place]:
    return {"clip": CLIP, "t5": T5, **SPACES}[space]


@cache
def _by_shape(space: str) -> dict[str, list[Place]]:
    table: dict[str, list[Place]] = {}
    for place in _places(space):
        table.setdefault(_shape(place.theirs), []).append(place)
    return table


@cache
def _by_ours(space: str) -> dict[str, list[tuple[Place, int]]]:
    table: dict[str, list[tuple[Place, int]]] = {}
    for place in _places(space):
        for i, path in enumerate(place.ours):
            table.setdefault(NUMBER.sub("#", path), []).append((place, i))
    return table


def _shape(name: str) -> str:
    return NUMBER.sub("#", name).replace(".", "_")


def _numbers(template: str, name: str) -> list[str] | None:
    """The numbers that stand for # in a template; None when another number differs."""
    here, there = NUMBER.findall(template), NUMBER.findall(name)
    if any(a not in ("#", b) for a, b in zip(here, there, strict=True)):
        return None
    return [b for a, b in zip(here, there, strict=True) if a == "#"]


def _filled(template: str, numbers: list[str]) -> str:
    rest = iter(numbers)
    return NUMBER.sub(lambda m: next(rest) if m[0] == "#" else m[0], template)
