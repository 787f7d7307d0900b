"""Sites that PEFT wraps one in another: parameters of one module, and nn.MultiheadAttention with its output projection.

parameter p_i of n that module M registers, adapted alike:    M.base_layer.(n - 1 - i times).lora_A.weight
M.out_proj of an attention M:                                 M.base_layer.out_proj.lora_A.weight
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...adapter import Site
from ...errors import Mismatch, quoted, some
from ...store.arrays import load
from ...tuners.experts import REGISTERED

OUT = ".out_proj"
Sites = dict[str, Site]


def is_output(path: str, sites: Mapping[str, Site]) -> bool:
    """Whether a site is the output projection of an nn.MultiheadAttention: no other module with weights has a child."""
    return path.endswith(OUT) and path.removesuffix(OUT) in sites


def places(sites: Mapping[str, Site]) -> dict[str, str]:
    """The module path that each site has in a file."""
    found, stacks = {}, defaultdict(list)
    for path, site in sites.items():
        if site.tuner.name == "experts":
            module, _, leaf = path.rpartition(".")
            stacks[module].append(leaf)
        elif is_output(path, sites):
            found[path] = f"{path.removesuffix(OUT)}.base_layer{OUT}"
        else:
            found[path] = path
    for module, leaves in stacks.items():
        for depth, leaf in enumerate(reversed(_registered(module, leaves))):
            found[f"{module}.{leaf}"] = module + ".base_layer" * depth
    return found


def _registered(module: str, leaves: list[str]) -> list[str]:
    """Parameters in the order in which their module registers them, in which PEFT wraps them."""
    if not module:
        raise Mismatch(f"{some(leaves)} belongs to the model itself, where PEFT wraps no parameter")
    if len(leaves) > 1 and (unknown := set(leaves) - set(REGISTERED)):
        raise Mismatch(
            f"{quoted(module)} has several adapted parameters, and the order in which PEFT wraps "
            f"{some(sorted(unknown))} is not known"
        )
    return sorted(leaves, key=lambda n: REGISTERED.index(n) if n in REGISTERED else -1)


def settled(sites: Sites) -> Sites:
    """Sites as PEFT's settings can say them: an attention's two share rank and alpha, and PEFT adds the output's twice."""
    made = dict(sites)
    for path in sites:
        if is_output(path, sites):
            parent = path.removesuffix(OUT)
            made[parent], made[path] = _shared(parent, sites[parent], sites[path])
    return made


def _shared(path: str, joint: Site, output: Site) -> tuple[Site, Site]:
    if {joint.tuner.name, output.tuner.name} != {"lora"}:
        raise Mismatch(f"{quoted(path)} is an nn.MultiheadAttention, on which PEFT has LoRA only")
    r, mine, its = max(joint.tuner.r, output.tuner.r), joint.tuner.scale, output.tuner.scale / 2
    scale = mine or its or 1.0
    alpha = joint.tuner.alpha if mine and r == joint.tuner.r else scale * (r**0.5 if joint.tuner.rslora else r)
    # one alpha serves both: what the output's scale has more goes to its B
    tuner = replace(joint.tuner, r=r, alpha=alpha)
    return _wide(joint, tuner, mine / scale), _wide(output, tuner, its / scale)


def _wide(site: Site, tuner: object, factor: float) -> Site:
    """The same update with the tuner's rank, by rows and columns of zeros, and B times a factor."""
    A, B = (load(site.params[k], np.dtype("f4")) for k in "AB")
    more = tuner.r - site.tuner.r
    B = B if factor == 1 else B * np.float32(factor)
    return Site(tuner, site.params | {"A": np.pad(A, ((0, more), (0, 0))), "B": np.pad(B, ((0, 0), (0, more)))})
