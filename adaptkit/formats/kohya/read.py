"""Reading: every tensor belongs to a module that a known model has, or the file is refused.

dW = (alpha / r) up down     r: the rows of down; no alpha means alpha = r
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ... import registry
from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from ...store.arrays import FLOATS, load
from ...store.checkpoint import warn
from ...store.entry import Entry
from ..files import tensors
from ..fold import KIND, rows, split, stored
from .names import Found, component, find, prefix_of

Parts = dict[str, Entry]
PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "m", "lora_mid.weight": "mid"}
# what a much copied script makes of diffusers' names: the component twice, and no dot
DOUBLED = re.compile(r"(lora_unet_)unet_(.+)_(lora_(?:down|up)\.weight|alpha)")
LYCORIS = {  # the first part of a tensor's name, and what has such tensors
    "hada_": "LoHa", "lokr_": "LoKr", "oft_blocks": "OFT or BOFT", "oft_diag": "OFT", "a1.": "GLoRA", "a2.": "GLoRA",
    "b1.": "GLoRA", "b2.": "GLoRA", "diff": "LyCORIS full", "w_norm": "trained norms", "b_norm": "trained norms",
    "on_input": "LyCORIS IA3", "weight": "LyCORIS IA3", "rescale": "BOFT", "reshape_weight": "a reshaped weight",
}  # fmt: skip


def read(path: Path) -> Adapter:
    """The adapter in a file. Raises Mismatch for what is no LoRA, or belongs to no known model."""
    entries, metadata, file = tensors(path)
    try:
        adapter = assemble(entries)
    except AdaptKitError as e:
        raise e.at(file.name) from None
    adapter.meta |= {f"kohya:{k}": v for k, v in metadata.items()}
    return adapter


def assemble(entries: dict[str, Entry]) -> Adapter:
    """Sites by diffusers' module paths, with the component before them ("unet.down_blocks. ...")."""
    modules = _modules(entries)
    places = _places(modules)
    flux = any(p.space.startswith("flux") for p in places.values())
    adapter, alphas, prefixes = Adapter(), {}, {}
    last = _last_context(modules)
    if tucker := [flat for flat, parts in modules.items() if "mid" in parts]:
        warn(f"lora_mid of {some(tucker)} is multiplied into lora_down, one rounding")
    for flat, parts in modules.items():
        prefix, found = prefix_of(flat), places[flat]
        home = component(prefix, found.space, flux)
        prefixes[home] = prefix
        alphas[flat] = parts["alpha"].dtype if "alpha" in parts else ""
        if flat == last:  # other rows than the other blocks, in diffusers: kept under the script's name
            found = Found("sd3", (f"joint_blocks.{flat.split('_')[4]}.context_block.adaLN_modulation.1",))
        for name, site in zip(found.paths, _sites(flat, parts, found), strict=True):
            if f"{home}.{name}" in adapter.sites:
                raise Corrupt(f"{quoted(flat)} is given twice, under two spellings")
            adapter.sites[f"{home}.{name}"] = site
    adapter.meta = {"kohya/space": _space(places), "kohya/prefixes": json.dumps(prefixes, sort_keys=True)}
    adapter.meta["kohya/alphas"] = json.dumps(_exceptions(alphas), sort_keys=True)
    return adapter


def _modules(entries: dict[str, Entry]) -> dict[str, Parts]:
    modules: dict[str, Parts] = {}
    for key, entry in entries.items():
        flat, _, part = DOUBLED.sub(r"\1\2.\3", key).partition(".")
        if prefix_of(flat) is None or part not in PARTS:
            raise _foreign(key, part)
        if entry.dtype not in FLOATS and part != "alpha":
            raise Mismatch(f"{quoted(key)} has dtype {entry.dtype}, adapters hold F32, F16, BF16 or F64")
        modules.setdefault(flat, {})[PARTS[part]] = entry
    return modules


def _foreign(key: str, part: str) -> Mismatch:
    if key.startswith("bundle_emb."):
        return Mismatch(f"holds embeddings beside the LoRA ({quoted(key)})", hint="take them out first")
    if key.startswith("oft_unet_"):
        return Mismatch(
            f"is OFT ({quoted(key)}), only LoRA, LoCon and DoRA are read here", hint="merge it with its trainer"
        )
    kind = next((k for start, k in LYCORIS.items() if part.startswith(start)), None)
    if kind:
        hint = "merge it with LyCORIS, or train a LoCon"
        return Mismatch(f"is {kind} ({quoted(key)}), only LoRA, LoCon and DoRA are read here", hint=hint)
    return Mismatch(f"{quoted(key)} is no part of a LoRA", hint="is it damaged, or of another program?")


def _places(modules: dict[str, Parts]) -> dict[str, Found]:
    found = {flat: find(p, flat.removeprefix(p)) for flat in modules if (p := prefix_of(flat))}
    if lost := sorted(flat for flat, place in found.items() if place is None):
        raise Mismatch(
            f"{some(lost)} {'is' if len(lost) == 1 else 'are'} no module of SD 1, SD 2, SDXL, SD 3 or FLUX",
            hint="other models' names cannot be told from flattened ones",
        )
    denoisers = {p.space for p in found.values()} - {"clip", "t5"}
    if len(denoisers - {"flux-diffusers"}) > 1:
        raise Mismatch(f"holds modules of several models ({some(sorted(denoisers))})")
    return found


def _space(places: dict[str, Found]) -> str:
    return next((p.space for p in places.values() if p.space not in ("clip", "t5")), "")


def _last_context(modules: dict[str, Parts]) -> str | None:
    """The context norm of SD 3's last block: the only one without a projection beside it."""
    end = "_context_block_adaLN_modulation_1"
    norms = [m for m in modules if m.startswith("lora_unet_joint_blocks_") and m.endswith(end)]
    alone = [m for m in norms if m.replace("adaLN_modulation_1", "attn_proj") not in modules]
    return max(alone, key=lambda m: int(m.split("_")[4]), default=None)


def _exceptions(alphas: dict[str, str]) -> dict[str, Any]:
    """The dtype that most alphas have, and the names of the others: alphas are written again as they were."""
    common = Counter(alphas.values()).most_common(1)[0][0]
    return {"": common} | {flat: dtype for flat, dtype in alphas.items() if dtype != common}


def _sites(flat: str, parts: Parts, found: Found) -> list[Site]:
    site = _site(flat, parts)
    out = site.params["B"].shape[0]
    if found.cut == "swap":
        turned = {k: _swapped(v, flat) for k, v in site.params.items() if k != "A"}
        return [Site(site.tuner, {"A": site.params["A"], **turned})]
    if found.cut == "equal" and out % 3 == 0:
        return split(site, [out // 3] * 3)
    wide = math.prod(site.params["A"].shape[1:])
    if found.cut == "linear1" and out > 3 * wide:
        return split(site, [wide, wide, wide, out - 3 * wide])
    if found.cut:
        raise Mismatch(f"{quoted(flat)} has {out} rows for {wide} inputs, which are no q, k and v")
    return [site]


def _swapped(value: Any, flat: str) -> np.ndarray:
    half, odd = divmod(value.shape[0], 2)
    if odd:
        raise Mismatch(f"{quoted(flat)} has {value.shape[0]} rows, an even number is expected")
    return np.concatenate([stored(rows(value, half, 2 * half)), stored(rows(value, 0, half))])


def _site(flat: str, parts: Parts) -> Site:
    for have, lack, name in (("A", "B", "lora_up"), ("B", "A", "lora_down")):
        if have in parts and lack not in parts:
            raise Mismatch(f"{quoted(flat)} has no {name}; the module is incomplete", hint="fetch it again")
    if "A" not in parts:
        raise Mismatch(f"{quoted(flat)} has an alpha or a norm, but no factors", hint="fetch it again")
    params = _with_mid(flat, {k: v for k, v in parts.items() if k != "alpha"})
    A, B = params["A"].shape, params["B"].shape
    if len(A) < 2 or len(B) != len(A) or A[0] != B[1] or not A[0] or math.prod(B[2:]) != 1:
        raise Mismatch(f"{quoted(flat)}: lora_down {list(A)} and lora_up {list(B)} do not fit each other")
    if "m" in params:
        params["m"] = _magnitude(flat, params["m"], B[0], len(B))
    alpha = _alpha(flat, parts["alpha"]) if "alpha" in parts else float(A[0])
    return Site(registry.load("tuners", "dora" if "m" in params else "lora")(r=A[0], alpha=alpha), params)


def _alpha(flat: str, entry: Entry) -> float:
    values = load(entry).astype("f8").reshape(-1)
    if values.size != 1 or not np.isfinite(values).all():
        raise Corrupt(f"the alpha of {quoted(flat)} is {quoted(values.tolist())}, one number is expected")
    return float(values[0])


def _magnitude(flat: str, m: Any, out: int, dims: int) -> Any:
    """DoRA's norms, in the shape that PEFT has: (out,) or (1, out, 1, 1). Those of the input axis mean something else."""
    if m.shape[0] != out or math.prod(m.shape) != out:
        hint = "no other program has this DoRA: merge it with LyCORIS"
        raise Mismatch(
            f"{quoted(flat)} has a norm for each input ({list(m.shape)}), not for each of {out} outputs", hint=hint
        )
    return stored(m).reshape((out,) if dims == 2 else (1, out, *[1] * (dims - 2)))


def _with_mid(flat: str, params: dict[str, Any]) -> dict[str, Any]:
    """Tucker's three factors as two: A[p, i, h, w] = sum_q mid[p, q, h, w] down[q, i]."""
    if "mid" not in params:
        return params
    mid, down = params.pop("mid"), params["A"]
    if len(mid.shape) < 3 or mid.shape[1] != down.shape[0] or math.prod(down.shape[2:]) != 1:
        raise Mismatch(f"{quoted(flat)}: lora_mid {list(mid.shape)} and lora_down {list(down.shape)} do not fit")
    wide = np.einsum("pq...,qi->pi...", load(mid).astype("f8"), load(down).astype("f8").reshape(down.shape[:2]))
    return {**params, "A": wide.astype(stored(down).dtype)} if stored(down).dtype.name in KIND else params
