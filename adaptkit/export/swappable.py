"""One graph for many adapters: slots opened in a live model, and their defaults in the graph that was traced of it.

y = o * W (i * x) + (i * x) A B     what is lent to a slot while the model runs; nothing is lent: y = W x
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Mismatch, some
from ..live.attach import unwrapped
from . import slots
from .graph import Graph, flat, nested

RANK = 3  # of the sample: no 0 or 1, which tracing would take for fixed
Shapes = Mapping[str, Sequence[int | None]]


class Lending(nn.Module):
    """A graph's module whose further inputs are lent to the slots of the model inside."""

    def __init__(self, inner: nn.Module, model: nn.Module, shapes: Shapes):
        super().__init__()
        self.inner, self.config = inner, model.config
        self.whole = [model]  # in a list, so that its parameters are not found twice
        self.shapes = dict(shapes)

    @property
    def model(self) -> nn.Module:
        """The model inside."""
        return self.whole[0]

    def forward(self, **words: Any) -> Any:
        given = dict(flat({n: v for n, v in words.items() if isinstance(v, Mapping)}))
        lent = {n: given[n] for n in self.shapes}
        tops = {n.partition(".")[0] for n in self.shapes}
        with opened(self.model, lent):
            return self.inner(**{n: v for n, v in words.items() if n not in tops})


@contextlib.contextmanager
def opened(model: nn.Module, lent: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside, the modules of a model compute with what is lent to their slots."""
    modules = unwrapped(model)
    handles = []
    try:
        for site, here in _by_site(lent).items():
            handles += _open(modules[site], here)
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _by_site(lent: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in lent.items():
        site = slots.site_of(name)
        found.setdefault(site, {})[name.removeprefix(f"{site}.")] = value
    return found


def _open(module: nn.Module, lent: Mapping[str, Tensor]) -> Iterator[Any]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * lent[slots.IN], *args[1:])

    def after(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        y = y * lent[slots.OUT] if slots.OUT in lent else y
        return y + args[0] @ lent[slots.A] @ lent[slots.B] if slots.A in lent else y

    if slots.IN in lent:
        yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)


def swappable(graph: Graph, model: nn.Module, shapes: Shapes) -> Graph:
    """The same graph with slots: shapes of the inputs, as slots.union gives them."""
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    idle = {n: torch.from_numpy(slots.idle(n, shape, RANK)).to(device, dtype) for n, shape in shapes.items()}
    axes = {n: {i: f"{slots.site_of(n)}.rank"} for n in shapes if (i := slots.rank_of(n)) is not None}
    sample = nested([*flat(graph.sample), *idle.items()])
    module = Lending(graph.module, model, shapes)
    return replace(graph, module=module, sample=sample, axes={**graph.axes, **axes}, slots=shapes)


def optional(traced: Any, shapes: Shapes) -> None:
    """Give an onnx_ir.Model's slots their defaults, so that a run without an adapter is the base model's.

    Raises Mismatch when the graph never reads one of them: an adapter would be taken and do nothing.
    """
    import onnx_ir

    inputs = {value.name: value for value in traced.graph.inputs}
    if unread := [n for n in shapes if n not in inputs or not inputs[n].uses()]:
        sites = dict.fromkeys(map(slots.site_of, unread))
        raise Mismatch(
            f"the graph never comes through {some(sites)}, which the adapter changes", hint="choose another --task"
        )
    for name, shape in shapes.items():
        value = inputs[name]
        idle = slots.idle(name, shape).astype(value.dtype.numpy())
        value.const_value = onnx_ir.tensor(np.ascontiguousarray(idle), dtype=value.dtype, name=name)
        traced.graph.initializers[name] = value


def products(model: Any) -> list[str]:
    """The nodes of an onnx.ModelProto that multiply by what a slot holds: quantisation must leave them alone.

    The tools would take the default, which is nothing, for a weight.
    """
    lent = {i.name for i in model.graph.input} & {i.name for i in model.graph.initializer}
    return [node.name for node in model.graph.node if lent & set(node.input)]
