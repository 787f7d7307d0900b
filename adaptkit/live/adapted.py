"""Adapted: the only wrapper there is. A module, and the sites that stand on it by adapter name."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..adapter import Site
from ..tuners.base import Tuner


class Adapted(nn.Module):
    """y = the base's output with every active adapter applied, in order.

    base: the module as it was.    params: adapter name -> its numbers.    active: names that act, in order.
    merged: names whose update is in the base's weight at the moment, in the order in which they went in.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.params = nn.ModuleDict()
        self.tuners: dict[str, Tuner] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True
        self.train(base.training)

    def add(self, name: str, site: Site) -> None:
        """Put a site on, inactive; its numbers are float32 where the base's are shorter, so that small steps count."""
        weight = next(self.base.parameters())
        self.params[key(name)] = nn.ParameterDict(
            {
                k: nn.Parameter(_long(v.detach().to(weight.device)), requires_grad=_trains(v))
                for k, v in site.params.items()
            }
        )
        self.tuners[name] = site.tuner

    def remove(self, name: str) -> Site:
        """Take a site off, with its numbers."""
        params = {k: v.detach() for k, v in self.params.pop(key(name)).items()}
        self.active = [n for n in self.active if n != name]
        return Site(self.tuners.pop(name), params)

    def of(self, name: str) -> nn.ParameterDict:
        """The numbers of one adapter."""
        return self.params[key(name)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = self.base
        for name in self.active if self.enabled else ():
            if name not in self.merged:
                call = partial(self.tuners[name].forward, call, self.of(name))
        return call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # models look at their layers' weight, in_features, ...


def key(name: str) -> str:
    """An adapter's name as a module's: dots would be taken for a path."""
    return "adapter_" + name.replace(".", "\u2024")  # prefixed, since ModuleDict refuses its own methods' names


def _long(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value.clone()


def _trains(value: Tensor) -> bool:
    return value.is_floating_point()
