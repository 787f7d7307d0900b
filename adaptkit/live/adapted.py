"""Adapted: a module, and the sites that stand on it by adapter name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Site
from ..errors import Mismatch
from ..tuners.base import Tuner
from .wrapper import Wrapper

BESIDE = ("weight", "bias")  # what a tuner changes on an ordinary module


class Adapted(Wrapper):
    """y = the base layer's output with every active adapter applied, in order.

    base_layer: the module as it was, or another Adapted when several parameters of one module are adapted.
    parameter: the one that is adapted.
    """

    def __init__(self, base_layer: nn.Module, parameter: str = "weight"):
        super().__init__()
        self.base_layer = base_layer
        self.parameter = parameter
        self.tuners: dict[str, Tuner] = {}
        self.settle()
        self.train(base_layer.training)

    def settle(self) -> None:
        """Make the place where numbers are kept; other names for them are other ways to do these four."""
        self.params = nn.ModuleDict()

    def put(self, name: str, params: Mapping[str, nn.Parameter]) -> None:
        """Keep the numbers of one adapter."""
        self.params[key(name)] = nn.ParameterDict(params)

    def of(self, name: str) -> Mapping[str, Tensor]:
        """The numbers of one adapter, by the paper's letters."""
        return self.params[key(name)]

    def drop(self, name: str) -> None:
        """Forget the numbers of one adapter."""
        del self.params[key(name)]

    def add(self, name: str, site: Site, copy: bool = True) -> None:
        """Put a site on, inactive; its numbers are float32 where the base's are shorter, so that small steps count."""
        device = next(self.bare().parameters()).device
        long = {letter: _long(value.detach().to(device), copy) for letter, value in site.params.items()}
        self.put(name, {k: nn.Parameter(v, requires_grad=site.tuner.trains(k, v)) for k, v in long.items()})
        self.tuners[name] = site.tuner

    def remove(self, name: str) -> Site:
        """Take a site off, with its numbers."""
        params = {letter: value.detach() for letter, value in self.of(name).items()}
        self.drop(name)
        self.active = [n for n in self.active if n != name]
        return Site(*self.tuners.pop(name).kept(params))

    @property
    def inside(self) -> bool:
        """Whether the module runs with the changed parameter in its place, instead of the update beside its output."""
        return self.parameter != "weight" or any(t.inside for t in self.tuners.values())

    def names(self) -> Collection[str]:
        return self.tuners

    def bare(self) -> nn.Module:
        module = self.base_layer
        while isinstance(module, Adapted):
            module = module.base_layer
        return module

    def through(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        acting = [n for n in names if n in self.tuners and n not in self.merged_adapters]
        if acting and self.inside:
            return self._with_parameter(acting, args, kwargs)
        call: Any = self.base_layer
        for name in acting:
            call = partial(self.tuners[name].forward, call, self.of(name))
        return call(*args, **kwargs)

    def value(self, part: str, names: Sequence[str], wide: torch.dtype | None = None) -> Tensor:
        """A parameter after adapters, summed in `wide` (float32 for shorter ones when left out) and rounded once."""
        stored = getattr(self.bare(), part)
        value = stored.to(wide or (torch.float32 if stored.dtype.itemsize < 4 else stored.dtype))
        for name in names:
            tuner = self.tuners[name]
            change = tuner.bias if part == "bias" else tuner.weight
            value = change(value, {k: _like(v, value) for k, v in self.of(name).items()})
        return value.to(stored.dtype)

    def parts(self, names: Sequence[str]) -> Iterator[str]:
        """The parameters that adapters change."""
        yield self.parameter
        changed = any(self.tuners[n].changes_bias(self.of(n)) for n in names)
        if self.inside or not changed:
            return
        if getattr(self.bare(), "bias", None) is not None:
            yield "bias"
        elif lost := [n for n in names if "c" in self.of(n)]:
            raise Mismatch(f"the trained bias of {lost[0]!r} has no bias to go into on a {type(self.bare()).__name__}")

    def _with_parameter(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        if self.rows is not None and len(set(self.rows)) > 1:
            raise Mismatch(f"adapter_names cannot differ in a batch where {self.parameter} is adapted")
        depth, module = 0, self.base_layer
        while isinstance(module, Adapted):
            depth, module = depth + 1, module.base_layer
        value = self.value(self.parameter, names)
        return torch.func.functional_call(
            self.base_layer, {"base_layer." * depth + self.parameter: value}, args, kwargs
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # models look at their layers' weight, in_features, ...


class Read(Adapted):
    """A layer whose weight is read by its parent, which never calls it."""

    @property
    def weight(self) -> Tensor:
        """The weight as the active adapters make it."""
        acting = [n for n in self.active if self.enabled and n in self.tuners and n not in self.merged_adapters]
        return self.value("weight", acting) if acting else self.base_layer.weight


def key(name: str) -> str:
    """An adapter's name as a module's: dots would be taken for a path."""
    return "adapter_" + name.replace(".", "\u2024")  # prefixed, since ModuleDict refuses its own methods' names


def _long(value: Tensor, copy: bool) -> Tensor:
    if value.is_floating_point() and value.dtype.itemsize < 4:
        return value.float()
    return value.clone() if copy else value


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device, other.dtype) if value.is_floating_point() else value.to(other.device)
