"""Writing: scales go into the factors, because most readers take a file's scale as 1 whatever it says.

Metadata that came with the adapter and still says the truth is kept, and then nothing is folded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Mismatch, quoted, some
from ..base import Note
from ..fold import chosen, stored, with_scale
from ..save import file, ordered
from .keys import BODIES, component
from .read import SETTINGS, settings, tuner_settings

ENDINGS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "c": "lora_B.bias"}


def write(adapter: Adapter, path: Path, drop: Collection[str] = ()) -> list[Note]:
    """Write one safetensors file. Raises Mismatch for what no pipeline of diffusers has."""
    sites, _, notes = chosen(adapter, "diffusers", {"conv", "dora", "bias"}, drop)
    _of_a_pipeline(sites)
    metadata = {k.removeprefix("diffusers:"): v for k, v in adapter.meta.items() if k.startswith("diffusers:")}
    if not _true(metadata, sites):
        metadata = {"software": '{"name": "adaptkit"}'}
        notes += [
            Note("folded", p, f"its scale {s.tuner.scale:g} went into lora_B: readers take 1")
            for p, s in sites.items()
            if s.tuner.scale != 1
        ]
        sites = {p: with_scale(s, 1.0, p) for p, s in sites.items()}
    file(path, ordered(_tensors(sites)), {"format": "pt"} | metadata)
    return notes


def _of_a_pipeline(sites: Mapping[str, Site]) -> None:
    homes = {component(p) for p in sites}
    if strange := [p for p in sites if not component(p) and not p.startswith(BODIES)]:
        text = f"{some(strange)} {'is' if len(strange) == 1 else 'are'} no module of a pipeline of diffusers"
        raise Mismatch(text, hint="it is for models of images; --to peft holds any module")
    if "" in homes and len(homes) > 1:
        raise Mismatch("some modules name their component (unet, text_encoder), others do not")
    if raw := [p for p in sites if ".joint_blocks." in p]:
        raise Mismatch(f"{some(raw)} has another order of rows in diffusers", hint="--to kohya and --to peft hold it")


def _true(metadata: Mapping[str, str], sites: Mapping[str, Site]) -> bool:
    """Whether metadata that was read says what the sites are now."""
    if SETTINGS not in metadata:
        return False
    try:
        configs = settings(dict(metadata))
        said = {p: tuner_settings(p, s.tuner.r, configs.get(component(p), {})) for p, s in sites.items()}
    except AdaptKitError:
        return False
    return all(
        said[p]["alpha"] == s.tuner.alpha and said[p].get("rslora", False) == s.tuner.rslora for p, s in sites.items()
    )


def _tensors(sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path, site in sites.items():
        for letter, value in site.params.items():
            if letter not in ENDINGS:
                raise Mismatch(f"{quoted(path)} has {quoted(letter)!r}, which diffusers has no name for")
            found[f"{path}.{ENDINGS[letter]}"] = _shaped(letter, stored(value), site)
    return found


def _shaped(letter: str, value: np.ndarray, site: Site) -> np.ndarray:
    """A magnitude vector as PEFT has it: (out,), for a convolution (1, out, 1, 1)."""
    dims: Any = len(site.params["B"].shape)
    if letter == "m":
        return value.reshape(-1) if dims == 2 else value.reshape(1, -1, *[1] * (dims - 2))
    return value
