"""(IA)^3 layers under PEFT's names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...adapter import Site
from .slots import Slotted


class IA3Layer(Slotted):
    """A module with (IA)^3 adapters.    ia3_l: (out, 1), or (1, in) where the input is scaled; (1, n, 1...) on kernels."""

    slots: ClassVar[dict[str, tuple[str, str]]] = {"l": ("ia3_l", "")}

    def add(self, name: str, site: Site, copy: bool = True) -> None:
        self.tuners[name] = site.tuner  # the shape depends on it
        super().add(name, site, copy)

    def put(self, name: str, params: Any) -> None:
        W, scaled = self.bare().weight, self.tuners[name].feedforward
        shape = (1, -1, *[1] * (W.ndim - 2)) if W.ndim > 2 else (1, -1) if scaled else (-1, 1)
        l = params["l"]
        super().put(name, {"l": nn.Parameter(l.detach().reshape(shape), requires_grad=l.requires_grad)})

    @property
    def is_feedforward(self) -> bool:
        """Whether the input is scaled, by the first adapter."""
        return next(iter(self.tuners.values())).feedforward


class Linear(IA3Layer):
    """(IA)^3 on nn.Linear and transformers' Conv1D."""


class Conv2d(IA3Layer):
    """(IA)^3 on nn.Conv2d."""


class Conv3d(IA3Layer):
    """(IA)^3 on nn.Conv3d."""


def wrap(module: nn.Module, parameter: str, site: Site) -> Slotted:
    """The layer for a module, as PEFT chooses it."""
    kind = {nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}.get(type(module), Linear)
    return kind(module)
