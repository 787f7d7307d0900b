"""Merging on a live model: the tuner's weight, rounded once, in the place of the base's. Undoing puts the old one back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import Corrupt, Mismatch, quoted, some
from . import loose
from .adapted import Adapted
from .attach import FLAG, adapted_modules, attached, detach
from .tied import Tied

KEPT = "_adaptkit_before"


def merge(
    model: nn.Module,
    names: str | Collection[str] | None = None,
    *,
    keep: bool = True,
    watch: Callable[[Iterable], Iterable] = iter,
) -> list[str]:
    """Put the updates of adapters into the weights they stand on, in place; they no longer run beside them.

    names: which, in order; the active ones when left out.    keep: hold the old weights for unmerge, at their size.
    watch: wraps the modules as they are merged, to show progress.

    Returns the names of the modules. Raises Mismatch for a name that is not attached, Corrupt for NaN or infinity;
    every weight is then what it was.
    """
    modules = adapted_modules(model)
    wanted = [names] if isinstance(names, str) else names
    there = attached(model)
    if lost := [n for n in wanted or () if n not in there]:
        raise Mismatch(f"no adapter named {some(lost)} is attached; there are: {some(sorted(there)) or 'none'}")
    chosen = {path: _chosen(path, module, wanted) for path, module in modules.items()}
    chosen = {path: mine for path, mine in chosen.items() if mine}
    done: dict[str, dict[str, nn.Parameter]] = {}
    try:
        with torch.no_grad():
            for path in watch(list(chosen)):
                done[path] = _replace(path, modules[path], chosen[path])
    except BaseException:
        for path, old in done.items():
            _restore(modules[path], old)
        raise
    for path, old in done.items():
        if isinstance(end := modules[path], Tied):
            old["weight"], end.bare().weight = end.bare().weight, end.other.bare().weight
        modules[path].merged_adapters += chosen[path]
        if keep and not hasattr(modules[path], KEPT):
            object.__setattr__(modules[path], KEPT, old)
    return list(chosen)


def unmerge(model: nn.Module) -> list[str]:
    """Give every weight back the bytes it had before merge. Raises Mismatch when they were not kept."""
    modules = {path: m for path, m in adapted_modules(model).items() if m.merged_adapters}
    if lost := [path for path, m in modules.items() if not hasattr(m, KEPT)]:
        raise Mismatch(f"the old weights of {some(lost)} were not kept", hint="merge with keep=True")
    for module in modules.values():
        _restore(module, getattr(module, KEPT))
        delattr(module, KEPT)
        module.merged_adapters = []
    return list(modules)


def absorb(
    model: nn.Module,
    names: str | Collection[str] | None = None,
    *,
    watch: Callable[[Iterable], Iterable] = iter,
) -> list[str]:
    """Merge for good: the updates of adapters go into the weights, and every adapter comes off.

    names: which, in order; the active ones when left out.    Raises as merge does; every weight is then what it was.
    """
    changed = merge(model, names, keep=False, watch=watch)
    wanted = [names] if isinstance(names, str) else names
    modules = adapted_modules(model).values()
    for module in modules:
        module.merged_adapters = []
        if hasattr(module, KEPT):
            delattr(module, KEPT)
    kept = loose.acting(model) if wanted is None else [n for n in wanted if n in loose.of(model)]
    loose.act(model, kept)
    for name in kept:
        changed += list(loose.of(model).pop(name).aside)
    for name in attached(model):
        detach(model, name)
    return changed


def _chosen(path: str, module: Adapted, wanted: Collection[str] | None) -> list[str]:
    """The adapters to merge into one module. Raises Mismatch for an order in which that is not defined."""
    names = module.active if wanted is None else wanted
    mine = [n for n in names if n in module.tuners and n not in module.merged_adapters]
    late = [n for n in mine if not module.tuners[n].follows]
    if late and (module.merged_adapters or mine.index(late[-1])):
        raise Mismatch(
            f"{module.tuners[late[-1]].name} must be the first change of {quoted(path)}", hint="merge it alone"
        )
    return mine


def _replace(path: str, module: Adapted, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Give the module parameters of its own, so that a tensor it shares with another module stays what it was."""
    base, old = module.bare(), {}
    values = {part: _merged(path, module, part, names) for part in module.parts(names)}
    for part, value in values.items():
        old[part] = getattr(base, part)
        new = nn.Parameter(value, requires_grad=old[part].requires_grad)
        if hasattr(old[part], FLAG):
            setattr(new, FLAG, getattr(old[part], FLAG))
        setattr(base, part, new)
    return old


def _restore(module: Adapted, old: dict[str, nn.Parameter]) -> None:
    for part, value in old.items():
        setattr(module.bare(), part, value)


def _merged(path: str, module: Adapted, part: str, names: Sequence[str]) -> Tensor:
    """One parameter after the adapters, summed one size up and rounded once."""
    before = getattr(module.bare(), part)
    stored = module.value(part, names, torch.float32 if before.dtype.itemsize < 4 else torch.float64)
    if not torch.isfinite(stored).all() and torch.isfinite(before).all():
        raise Corrupt(f"merged values overflow {str(before.dtype).removeprefix('torch.')}", where=f"{path}.{part}")
    return stored
