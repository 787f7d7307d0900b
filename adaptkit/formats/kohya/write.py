"""Writing: one final alpha for each module, so that alpha / r is the scale whatever it was called before."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...adapter import Adapter, Site
from ...errors import Mismatch, quoted, some
from ...store.arrays import NUMPY
from ..base import Note
from ..fold import chosen, fused, stored, with_scale
from ..save import Arrays, digest, file, ordered
from .names import flat
from .places import Place
from .read import _swapped
from .spaces import Home, homes

VERSIONS = {"sdxl": "sdxl_base_v1-0", "flux": "flux1", "flux-diffusers": "flux1", "sd3": "sd3"}
NETWORKS = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
Group = dict[int, tuple[str, Site]]


def write(adapter: Adapter, path: Path, base: Path | None = None, drop: Collection[str] = ()) -> list[Note]:
    """Write one safetensors file in the names of the model that the adapter is for.

    Raises Mismatch for what kohya's format cannot hold, and when the model cannot be told: then `base` says it.
    """
    sites, _, notes = chosen(adapter, "kohya", {"conv", "dora"}, drop)
    where, space = homes(adapter, sites, base)
    recorded = json.loads(adapter.meta.get("kohya/alphas", "{}"))
    tensors: Arrays = {}
    for name, (place, group) in _grouped(sites, where).items():
        site = _whole(name, place, group, notes)
        tensors |= _named(name, site, recorded.get(name, recorded.get("", "F32")))
        if site.tuner.rslora:
            notes.append(Note("folded", name, "rsLoRA's root went into alpha"))
    arrays = ordered(tensors)
    file(path, arrays, _metadata(adapter, arrays, sites, space))
    return notes


def _grouped(sites: dict[str, Site], where: dict[str, Home]) -> dict[str, tuple[Place, Group]]:
    """The sites that each module of the script holds, by its flat name."""
    groups: dict[str, tuple[Place, Group]] = {}
    lost = []
    for path, site in sites.items():
        home, _, rest = path.partition(".") if path.partition(".")[0] in where else ("", "", path)
        found = flat(where[home].space, rest) or _original(where[home].space, rest)
        if found is None:
            lost.append(path)
            continue
        name, index, place, modules = found
        group = groups.setdefault(where[home].prefix + name, (replace(place, ours=modules), {}))[1]
        if index in group:
            raise Mismatch(f"{quoted(group[index][0])} and {quoted(path)} would be one module, {quoted(name)}")
        group[index] = (path, site)
    if lost:
        raise Mismatch(
            f"{some(lost)} {'is' if len(lost) == 1 else 'are'} no module of the model that kohya's names are for",
            hint="kohya's files are for SD 1, SD 2, SDXL, SD 3 and FLUX; --to peft holds any module",
        )
    return groups


def _original(space: str, path: str) -> tuple[str, int, Place, tuple[str, ...]] | None:
    """A module that kept the script's name when it was read."""
    if space == "sd3" and path.startswith("joint_blocks."):
        return path.replace(".", "_"), 0, Place(path, (path,)), (path,)
    return None


def _whole(name: str, place: Place, group: Group, notes: list[Note]) -> Site:
    """One site of all that lie in a module of the script."""
    if place.cut == "swap":
        path, site = group[0]
        return Site(site.tuner, {k: v if k == "A" else _swapped(v, path) for k, v in site.params.items()})
    if len(place.ours) == 1:
        return group[0][1]
    full = _filled(name, place, group)
    if len({s.tuner.scale for s in full}) > 1:
        notes += [
            Note("folded", path, "q, k and v share one alpha here, so the scale went into lora_up")
            for path, _ in group.values()
        ]
        full = [with_scale(s, 1.0, name) for s in full]
    if len({s.tuner.name for s in full}) > 1:
        raise Mismatch(f"{quoted(name)} holds LoRA and DoRA, which one module of kohya's cannot")
    joined = fused(full)
    if joined.tuner.r > full[0].tuner.r:
        notes.append(Note("fused", name, f"{len(full)} modules lie in one here: rank {joined.tuner.r}"))
    return joined


def _filled(name: str, place: Place, group: Group) -> list[Site]:
    """The sites of a module, with zeros for those that the adapter leaves alone."""
    one = next(iter(group.values()))[1]
    if len(group) < len(place.ours) and one.tuner.name == "dora":
        raise Mismatch(f"{quoted(name)} needs norms for all of {some(place.ours)}, the adapter has DoRA on some")
    wide = math.prod(one.params["A"].shape[1:])
    sizes = [wide] * 3 + [4 * wide] if place.cut == "linear1" else [one.params["B"].shape[0]] * len(place.ours)
    return [group[i][1] if i in group else _nothing(one, size) for i, size in enumerate(sizes)]


def _nothing(like: Site, out: int) -> Site:
    """A site that adds nothing, and shares A with another."""
    B = like.params["B"]
    return Site(like.tuner, {"A": like.params["A"], "B": np.zeros((out, *B.shape[1:]), stored(B).dtype)})


def _named(name: str, site: Site, alpha: str) -> Arrays:
    tensors = {f"{name}.lora_down.weight": stored(site.params["A"]), f"{name}.lora_up.weight": stored(site.params["B"])}
    if "m" in site.params:
        m = stored(site.params["m"])
        tensors[f"{name}.dora_scale"] = m.reshape(-1, *[1] * (len(site.params["B"].shape) - 1))
    value = site.tuner.scale * site.tuner.r
    if alpha or value != site.tuner.r:
        tensors[f"{name}.alpha"] = _number(value, alpha or "F32")
    return tensors


def _number(value: float, dtype: str) -> np.ndarray:
    """alpha in the dtype it had, when that holds it; else in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.array(value).astype(NUMPY.get(dtype, NUMPY["F32"]))
    return kept if float(kept) == value else np.array(value, "f4")


def _metadata(adapter: Adapter, arrays: Arrays, sites: dict[str, Site], space: str) -> dict[str, str]:
    """What came with a kohya file, or the few lines that other programs look for; the sums made again."""
    kept = {k.removeprefix("kohya:"): v for k, v in adapter.meta.items() if k.startswith("kohya:")}
    ranks = Counter(s.tuner.r for s in sites.values()).most_common()
    scales = {s.tuner.scale for s in sites.values()}
    dora = any(s.tuner.name == "dora" for s in sites.values())
    made = {
        "ss_network_module": "lycoris.kohya" if dora else NETWORKS.get(space, "networks.lora"),
        "ss_network_dim": str(ranks[0][0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{scales.pop() * ranks[0][0]:g}" if len(ranks) == len(scales) == 1 else "Dynamic",
        "ss_base_model_version": VERSIONS.get(space, "sd_v1"),
        "ss_v2": "False",
    }
    found, old = digest(arrays), kept.get("sshs_model_hash", "")
    if old.removeprefix("0x") == found:  # LyCORIS writes 0x
        return kept
    kept.pop("sshs_legacy_hash", None)  # depends on another program's header
    return made | kept | {"sshs_model_hash": found}
