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
        if parameter == "weight":
            checked(at, modules)
    whole = {name: torch.as_tensor(load(value)) for name, value in adapter.whole.items()}
    spoken = _spoken_of(model, config, whole)
    _nothing_new(model, {n: v for n, v in whole.items() if n not in spoken}, folder)
    return Adapter(adapter.sites, {n: v for n, v in whole.items() if n in spoken}, adapter.meta, adapter.about)


def _spoken_of(model: nn.Module, config: PeftConfig, whole: dict[str, torch.Tensor]) -> set[str]:
    """The tensors that modules_to_save and bias ask for."""
    inside = tuple(f"{path}." for path in heads.chosen(model, config.modules_to_save or ()))
    bias = getattr(config, "bias", "none") != "none"
    return {n for n in whole if n.startswith(inside or "\0") or (bias and n.rpartition(".")[2] == "bias")}


def _nothing_new(model: nn.Module, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """PEFT saves a copy of an adapted embedding beside its factors: fine, as long as the model has the same numbers."""
    modules = unwrapped(model)
    for name, there in whole.items():
        path, _, leaf = name.rpartition(".")
        here = getattr(modules.get(path), leaf, None)
        if here is None or here.shape != there.shape or not torch.equal(here.detach().cpu().float(), there.float()):
            raise Mismatch(
                f"replaces {quoted(name)} outright, which no setting of it speaks of",
                where=folder,
                hint="merge it with adaptkit.merge",
            )


def missing(model: nn.Module, config: PeftConfig, adapter: Adapter) -> list[str]:
    """The modules that the settings choose and the file holds nothing for; warned of."""
    lost = [p for p in resolved(model, config) if p not in adapter.sites]
    if lost:
        warnings.warn(f"the adapter holds nothing for {some(lost)}, which its settings choose", AdaptKitWarning)
    return lost
