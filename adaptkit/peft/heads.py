"""Modules that train as a whole beside an adapter: modules_to_save, such as a fresh classification head."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Mismatch, Usage, quoted, some
from ..live.adapted import Adapted
from ..live.attach import Homes, attached, thaw, tree
from ..live.replaced import Replaced

COMMON = {"classifier", "score"}  # PEFT names both for every classifier, which has one of them


def chosen(model: nn.Module, names: Collection[str]) -> list[str]:
    """The paths of the modules that end in one of the names; none lies inside another.

    Raises Mismatch for a name that no module ends in.
    """
    found: list[str] = []
    paths = [path for path, _, _ in tree(model)]
    for path in paths:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and path.endswith(tuple(names)):
            found.append(path)
    lost = [n for n in names if not any(p.endswith(n) for p in paths if p)]
    if lost and (not found or set(lost) - COMMON):
        raise Mismatch(f"modules_to_save: no module is called {some(sorted(lost))}")
    return found


def train_whole(model: nn.Module, name: str, paths: Collection[str]) -> dict[str, nn.Module]:
    """A copy of each module for one more adapter, inactive. Raises Mismatch for a module that carries an adapter."""
    homes, found = Homes(model), {}
    there = {path: (around, module) for path, around, module in tree(model)}
    for path in paths:
        around, module = there[path]
        if any(isinstance(m, Adapted) for m in [*around, *module.modules()]):
            raise Mismatch(
                f"{quoted(path)} is in modules_to_save and carries an adapter too", hint="do one or the other"
            )
        if not around:
            around = [Replaced(module)]
            homes.put(module, around[0])
        found[path] = around[0].add(name)
    return found


def of(model: nn.Module) -> dict[str, Replaced]:
    """The replaced modules of a model, by path."""
    return {path: around[0] for path, around, _ in tree(model) if around and isinstance(around[0], Replaced)}


def entries(model: nn.Module, name: str) -> Iterator[tuple[str, str, Any]]:
    """Every tensor of one adapter's copies: its path in the model, that in a file, and itself."""
    for path, module in of(model).items():
        if name in module.names():
            for leaf, value in module.modules_to_save[name].state_dict(keep_vars=True).items():
                yield f"{path}.modules_to_save.{name}.{leaf}", f"{path}.{leaf}", value


def load(copies: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> set[str]:
    """Fill copies with values by parameter path; the paths that were used. A head may have another number of rows."""
    used = set()
    for path, copy in copies.items():
        mine = {k.removeprefix(f"{path}."): v for k, v in values.items() if k.startswith(f"{path}.")}
        for leaf, value in mine.items():
            target = copy.get_submodule(leaf.rpartition(".")[0]), leaf.rpartition(".")[2]
            here = getattr(*target, None)
            if here is None or here.shape != value.shape:
                seen = "nothing" if here is None else list(here.shape)
                raise Mismatch(f"{quoted(path)}.{quoted(leaf)} is {list(value.shape)}, the model has {seen}")
            with torch.no_grad():
                here.copy_(value)
        used |= {f"{path}.{leaf}" for leaf in mine}
    return used


def one_each(model: nn.Module, names: Collection[str]) -> None:
    """Raise Usage when several of these adapters have a copy of one module: only one can act."""
    for path, module in of(model).items():
        if len(several := [n for n in names if n in module.names()]) > 1:
            raise Usage(f"{some(several)} each have a {quoted(path)} of their own, only one of which can act")


def keep(model: nn.Module, names: Collection[str]) -> None:
    """Put the copies of these adapters into the place of the originals, for good; other copies go."""
    homes = Homes(model)
    for module in of(model).values():
        homes.put(module, module.acting(list(names)))
    if not attached(model):
        thaw(model)  # which the copies were told when they were made


def activate(model: nn.Module, names: Collection[str]) -> None:
    """Let the copies of these adapters act, or the modules that were there."""
    for module in of(model).values():
        module.active = [n for n in names if n in module.names()]


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter's copies off."""
    homes = Homes(model)
    for module in of(model).values():
        if name in module.names():
            module.remove(name)
            if not module.names():
                homes.put(module, module.original_module)
