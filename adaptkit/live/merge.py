"""Merging on a live model: the tuner's weight, rounded once, in the place of the base's. Undoing puts the old one back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Corrupt, Mismatch, quoted, some
from .adapted import Adapted
from .attach import FLAG, adapted_modules, detach

KEPT = "_adaptkit_before"


def merge(model: nn.Module, names: str | Collection[str] | None = None, *, keep: bool = True) -> list[str]:
    """Put the updates of adapters into the weights they stand on, in place; they no longer run beside them.

    names: which, in order; the active ones when left out.    keep: hold the old weights for unmerge, at their size.

    Returns the names of the modules. Raises Mismatch for a name that is not attached, Corrupt for NaN or infinity,
    before any weight has changed.
    """
    modules = adapted_modules(model)
    wanted = [names] if isinstance(names, str) else names
    there = {n for m in modules.values() for n in m.tuners}
    if lost := [n for n in wanted or () if n not in there]:
        raise Mismatch(f"no adapter named {some(lost)} is attached; there are: {some(sorted(there)) or 'none'}")
    changed = {}
    with torch.no_grad():
        for path, module in modules.items():
            mine = [
                n
                for n in (module.active if wanted is None else wanted)
                if n in module.tuners and n not in module.merged
            ]
            if mine:
                changed[path] = (mine, {p: _merged(path, module, p, t, mine) for p, t in _parts(module)})
        for path, (mine, values) in changed.items():
            _replace(modules[path], values, keep)
            modules[path].merged += mine
    return list(changed)


def unmerge(model: nn.Module) -> list[str]:
    """Give every weight back the bytes it had before merge. Raises Mismatch when they were not kept."""
    modules = {path: m for path, m in adapted_modules(model).items() if m.merged}
    if lost := [path for path, m in modules.items() if not hasattr(m, KEPT)]:
        raise Mismatch(f"the old weights of {some(lost)} were not kept", hint="merge with keep=True")
    with torch.no_grad():
        for module in modules.values():
            for part, value in getattr(module, KEPT).items():
                setattr(module.base, part, value)
            delattr(module, KEPT)
            module.merged = []
    return list(modules)


def absorb(model: nn.Module, names: str | Collection[str] | None = None) -> list[str]:
    """Merge for good: the updates of adapters go into the weights, and every adapter comes off.

    names: which, in order; the active ones when left out.    Raises as merge does, before any weight has changed.
    """
    changed = merge(model, names, keep=False)
    modules = adapted_modules(model).values()
    for module in modules:
        module.merged = []
    for name in {n: None for m in modules for n in m.tuners}:
        detach(model, name)
    return changed


def _parts(module: Adapted) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in module.base.named_parameters(recurse=False) if n in ("weight", "bias")]


def _merged(path: str, module: Adapted, part: str, value: Tensor, names: list[str]) -> Tensor:
    """One parameter after the adapters, summed one size up and rounded once."""
    wide = value.to(torch.float32 if value.dtype.itemsize < 4 else torch.float64)
    for i, name in enumerate(names):
        tuner, p = module.tuners[name], module.of(name)
        if (i or module.merged) and not tuner.follows:
            raise Mismatch(f"{tuner.name} must be the first change of {quoted(path)}", hint="merge it alone")
        wide = getattr(tuner, part)(wide, {k: _wide(v, wide) for k, v in p.items()})
    stored = wide.to(value.dtype)
    if not torch.isfinite(stored).all() and torch.isfinite(value).all():
        raise Corrupt(f"merged values overflow {str(value.dtype).removeprefix('torch.')}", where=f"{path}.{part}")
    return stored


def _wide(value: Any, like: Tensor) -> Any:
    return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)


def _replace(module: Adapted, values: dict[str, Tensor], keep: bool) -> None:
    """Give the module parameters of its own, so that a tensor it shares with another module stays what it was."""
    if keep and not hasattr(module, KEPT):
        object.__setattr__(module, KEPT, dict(_parts(module)))
    for part, value in values.items():
        old = getattr(module.base, part)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        if hasattr(old, FLAG):
            setattr(new, FLAG, getattr(old, FLAG))
        setattr(module.base, part, new)
