"""Merging on a live model: the tuner's weight, rounded once, in the place of the base's. Undoing puts the old one back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import Corrupt, Mismatch, quoted, some
from . import loose, sums
from .adapted import Adapted
from .attach import adapted_modules, attached, detach, wrappers
from .tied import Tied
from .tokens import standing

KEPT = "_adaptkit_before"  # in a wrapper's own __dict__: what it lacks, it would ask the wrapper inside for
Values = dict[str, nn.Parameter]
Modules = dict[str, Adapted]
Watch = Callable[[Iterable], Iterable]


def merge(
    model: nn.Module,
    names: str | Collection[str] | None = None,
    *,
    keep: bool = True,
    watch: Watch = iter,
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
    if (here := standing(model)) and (virtual := [n for n in wanted or here.active if n in here.names()]):
        hint = "detach it, or name the others; adaptkit merge puts prompts into a checkpoint"
        raise Mismatch(f"{some(virtual)} is made of virtual tokens, which no weight holds", hint=hint)
    chosen = {path: _chosen(path, module, wanted) for path, module in modules.items()}
    chosen = {path: mine for path, mine in chosen.items() if mine}
    if empty := [p for p in chosen if getattr(modules[p].bare(), modules[p].parameter).is_meta]:
        raise Mismatch(f"{some(empty)} has no numbers, it is on the meta device", hint="load the weights first")
    with torch.no_grad():
        old = _merged_all(model, modules, chosen, keep, watch)
    for path, values in old.items():
        modules[path].merged_adapters += chosen[path]
        if keep and KEPT not in modules[path].__dict__:
            modules[path].__dict__[KEPT] = values
    _follow(model)
    return list(chosen)


def _merged_all(
    model: nn.Module, modules: Modules, chosen: dict[str, list[str]], keep: bool, watch: Watch
) -> dict[str, Values]:
    """Merge; returns the old values that are still there. What may overflow goes first, with its old value at hand.

    The rest cannot overflow, and is summed in place unless it is to be kept or shares its memory. When that is
    interrupted, what was summed counts as merged: the model computes what it did.
    """
    sure = {path for path, mine in chosen.items() if _sure(modules[path], mine)}
    shared = _shared(model)
    old: dict[str, Values] = {}
    try:
        for path in watch(sorted(chosen, key=sure.__contains__)):
            module = modules[path]
            weight = getattr(module.bare(), module.parameter)
            in_place = not keep and path in sure and weight.data_ptr() not in shared
            if in_place:
                _add(module, chosen[path], weight)
                module.merged_adapters += chosen[path]
            else:
                old[path] = _replace(path, module, chosen[path])
    except BaseException:
        for path, values in old.items():
            _restore(modules[path], values)
        raise
    return old


def _follow(model: nn.Module) -> None:
    """Give the other end of a tied matrix what the adapted one has now."""
    for end in (w for w in wrappers(model) if isinstance(w, Tied)):
        end.bare().weight = end.other.bare().weight
        end.merged_adapters = list(end.other.merged_adapters)


def unmerge(model: nn.Module) -> list[str]:
    """Give every weight back the bytes it had before merge. Raises Mismatch when they were not kept."""
    modules = {path: m for path, m in adapted_modules(model).items() if m.merged_adapters}
    if lost := [path for path, m in modules.items() if KEPT not in m.__dict__]:
        raise Mismatch(f"the old weights of {some(lost)} were not kept", hint="merge with keep=True")
    for module in modules.values():
        _restore(module, module.__dict__.pop(KEPT))
        module.merged_adapters = []
    _follow(model)
    return list(modules)


def absorb(
    model: nn.Module,
    names: str | Collection[str] | None = None,
    *,
    watch: Watch = iter,
) -> list[str]:
    """Merge for good: the updates of adapters go into the weights, and every adapter comes off.

    names: which, in order; the active ones when left out.    Raises as merge does; every weight is then what it was.
    """
    changed = merge(model, names, keep=False, watch=watch)
    wanted = [names] if isinstance(names, str) else names
    for module in adapted_modules(model).values():
        module.merged_adapters = []
        module.__dict__.pop(KEPT, None)
    kept = loose.acting(model) if wanted is None else [n for n in wanted if n in loose.of(model)]
    loose.act(model, kept)
    for name in kept:
        changed += loose.keep(model, name)
    for name in attached(model):
        detach(model, name)
    return changed


def _chosen(path: str, module: Adapted, wanted: Collection[str] | None) -> list[str]:
    """The adapters to merge into one module. Raises Mismatch for an order in which that is not defined."""
    names = dict.fromkeys(module.active if wanted is None else wanted)
    mine = [n for n in names if n in module.tuners and n not in module.merged_adapters]
    late = [n for n in mine if not module.tuners[n].follows]
    if late and (module.merged_adapters or mine.index(late[-1])):
        raise Mismatch(
            f"{module.tuners[late[-1]].name} must be the first change of {quoted(path)}", hint="merge it alone"
        )
    return mine


def _sure(module: Adapted, names: Sequence[str]) -> bool:
    """Whether merging only adds thin factors, and cannot overflow."""
    weight = getattr(module.bare(), module.parameter)
    thin = sums.factors(module, names, _wide(weight))
    if thin is None or not weight.is_contiguous() or list(module.parts(names)) != [module.parameter]:
        return False
    return sums.reach(weight, thin) < 0.99 * torch.finfo(weight.dtype).max


def _shared(model: nn.Module) -> set[int]:
    """The addresses of parameters whose memory several names share, buffers' among them."""
    seen: dict[int, int] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for _, p in named:
        if p.device.type != "meta" and p.numel():
            seen[p.untyped_storage().data_ptr()] = seen.get(p.untyped_storage().data_ptr(), 0) + 1
    several = {at for at, times in seen.items() if times > 1}
    return {p.data_ptr() for p in model.parameters() if p.numel() and p.untyped_storage().data_ptr() in several}


def _add(module: Adapted, names: Sequence[str], weight: Tensor, into: Tensor | None = None) -> Tensor:
    thin = sums.factors(module, names, _wide(weight)) or []
    return sums.added(weight, thin, _wide(weight), weight.data if into is None else into)


def _wide(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype.itemsize < 4 else torch.float64


def _replace(path: str, module: Adapted, names: Sequence[str]) -> Values:
    """Give the module parameters of its own, so that a tensor it shares with another module stays what it was."""
    base, old = module.bare(), {}
    values = {part: _merged(path, module, part, names) for part in module.parts(names)}
    for part, value in values.items():
        old[part] = getattr(base, part)
        if value.stride() != old[part].stride():  # channels_last
            value = torch.empty_like(old[part]).copy_(value)
        setattr(base, part, nn.Parameter(value, requires_grad=old[part].requires_grad))
    return old


def _restore(module: Adapted, old: Values) -> None:
    for part, value in old.items():
        now = getattr(module.bare(), part)
        value.data = value.data.to(now.device, now.dtype)  # the model may have moved since
        setattr(module.bare(), part, value.requires_grad_(now.requires_grad))


def _merged(path: str, module: Adapted, part: str, names: Sequence[str]) -> Tensor:
    """One parameter after the adapters, summed one size up and rounded once."""
    before = getattr(module.bare(), part)
    if part == module.parameter and sums.factors(module, names, _wide(before)) is not None:
        stored = _add(module, names, before, torch.empty_like(before, memory_format=torch.contiguous_format))
    else:
        stored = module.value(part, names, _wide(before))
    if not _finite(stored) and _finite(before):
        raise Corrupt(f"merged values overflow {str(before.dtype).removeprefix('torch.')}", where=f"{path}.{part}")
    return stored


def _finite(value: Tensor) -> bool:
    return all(math.isfinite(float(v)) for v in value.aminmax())  # many times faster than isfinite on short floats
