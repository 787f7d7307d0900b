"""Adapters from folders: read by the format, and held against the model they are for."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import AdaptKitWarning, Mismatch, quoted, some
from ..formats.base import read
from ..live.attach import place, unwrapped
from ..store.arrays import load
from . import heads
from .config import PeftConfig
from .sites import checked, resolved

KINDS = {"lora", "dora", "ia3", "pissa", "olora", "experts", "tokens"}


def trained(model: nn.Module, folder: Path, config: PeftConfig) -> Adapter:
    """The adapter in a folder. Raises Mismatch for kinds that live models do not have."""
    adapter = read(folder, "peft")
    if other := sorted({s.tuner.name for s in adapter.sites.values()} - KINDS):
        raise Mismatch(
            f"holds {some(other)}, which live models do not have", where=folder, hint="merge it with adaptkit.merge"
        )
    modules = unwrapped(model)
    for path in adapter.sites:
        at, parameter = place(modules, path)
        if at == path and parameter == "weight":
            checked(at, modules)
    whole = {name: torch.as_tensor(load(value)) for name, value in adapter.whole.items()}
    inside = tuple(f"{path}." for path in heads.chosen(model, config.modules_to_save or ()))
    kept = {n: v for n, v in whole.items() if n.startswith(inside or "\0") or _differs(modules, n, v)}
    return Adapter(adapter.sites, kept, adapter.meta, adapter.about)


def _differs(modules: dict[str, nn.Module], name: str, there: torch.Tensor) -> bool:
    """Whether a tensor says something new: PEFT saves a copy of an embedding beside its factors, or when it grew."""
    path, _, leaf = name.rpartition(".")
    here = getattr(modules.get(path), leaf, None)
    if here is None:
        raise Mismatch(f"holds {quoted(name)}, which the model does not have")
    if here.shape != there.shape:
        hint = "call resize_token_embeddings on the base first" if here.ndim == 2 else ""
        raise Mismatch(f"{quoted(name)} is {list(there.shape)}, the model has {list(here.shape)}", hint=hint)
    return not torch.equal(here.detach().cpu().float(), there.float())


def missing(model: nn.Module, config: PeftConfig, adapter: Adapter) -> list[str]:
    """The modules that the settings choose and the file holds nothing for; warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptKitWarning)  # said when the adapter was put on
        lost = [p for p in resolved(model, config) if p not in adapter.sites]
    if lost:
        warnings.warn(f"the adapter holds nothing for {some(lost)}, which its settings choose", AdaptKitWarning)
    return lost
