"""Adapters from folders: read by the format, and held against the model they are for."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import AdaptKitWarning, Mismatch, quoted, some
from ..formats.base import read
from ..store.arrays import load
from .config import PeftConfig
from .sites import checked, resolved, unwrapped

KINDS = {"lora", "dora", "ia3"}


def trained(model: nn.Module, folder: Path) -> Adapter:
    """The adapter in a folder. Raises Mismatch for what it holds beyond LoRA and IA3."""
    adapter = read(folder, "peft")
    if other := sorted({s.tuner.name for s in adapter.sites.values()} - KINDS):
        raise Mismatch(
            f"holds {some(other)}, which is not there yet", where=folder, hint="merge it with adaptkit.merge"
        )
    _nothing_new(model, adapter, folder)
    modules = unwrapped(model)
    for path in adapter.sites:
        if path in modules:
            checked(path, modules)
    return Adapter(adapter.sites, {}, adapter.meta, adapter.about)


def _nothing_new(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """PEFT saves a copy of an adapted embedding beside its factors: fine, as long as the model has the same numbers."""
    modules = unwrapped(model)
    for name, value in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        here = getattr(modules.get(path), leaf, None)
        there = torch.as_tensor(load(value))
        if here is None or here.shape != there.shape or not torch.equal(here.detach().cpu().float(), there.float()):
            raise Mismatch(
                f"replaces {quoted(name)} outright (modules_to_save or a trained bias), which is not there yet",
                where=folder,
                hint="merge it with adaptkit.merge",
            )


def missing(model: nn.Module, config: PeftConfig, adapter: Adapter) -> list[str]:
    """The modules that the settings choose and the file holds nothing for; warned of."""
    lost = [p for p in resolved(model, config) if p not in adapter.sites]
    if lost:
        warnings.warn(f"the adapter holds nothing for {some(lost)}, which its settings choose", AdaptKitWarning)
    return lost
