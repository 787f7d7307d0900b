"""Replaced: a module that is trained as a whole, one copy for each adapter. The names are those of PEFT's files."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .wrapper import Wrapper


class Replaced(Wrapper):
    """y = the output of the last active adapter's copy; of the original module when no active adapter has one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.train(module.training)

    def add(self, name: str) -> nn.Module:
        """A copy for one more adapter, inactive; the copy trains."""
        made = copy.deepcopy(self.original_module)
        self.modules_to_save[name] = made.requires_grad_(True)
        return made

    def remove(self, name: str) -> nn.Module:
        """Take a copy off."""
        self.active = [n for n in self.active if n != name]
        self.merged_adapters = [n for n in self.merged_adapters if n != name]
        return self.modules_to_save.pop(name)

    def names(self) -> Collection[str]:
        return self.modules_to_save.keys()

    def bare(self) -> nn.Module:
        return self.original_module

    def acting(self, names: Sequence[str]) -> nn.Module:
        """The module that computes when these adapters act."""
        here = [n for n in [*self.merged_adapters, *names] if n in self.modules_to_save]
        return self.modules_to_save[here[-1]] if here else self.original_module

    def through(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return self.acting(names)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.acting(self.active if self.enabled else ()), name)
