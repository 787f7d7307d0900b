"""How adapters are in graphs: merged before, in slots that take one at a time, or as virtual tokens that act on the model."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..errors import Mismatch
from . import build, virtual
from .graph import BATCH, SEQUENCE, Axes, Graph
from .kept import Kept
from .swappable import swappable
from .task import Task


def graphs(model: nn.Module, task: Task, kept: Kept | None = None) -> list[Graph]:
    """The graphs of a model and of what acts on it.    kept: adapters that stay beside them.

    Raises Mismatch for adapters that such graphs cannot have.
    """
    if kept is not None:
        return [_swappable(model, task, kept)]
    if not virtual.count(model):
        return build.graphs(model, task)
    return {"decoder": _decoder, "encoder": _encoder, "seq2seq": _seq2seq}[task.kind](model, task)


def _swappable(model: nn.Module, task: Task, kept: Kept) -> Graph:
    if virtual.count(model):
        raise Mismatch("virtual tokens act on the model, which adapters in slots would not reach", hint="detach them")
    return swappable(build.graphs(model, task)[0], model, kept.fitted(model))


def _decoder(model: nn.Module, task: Task) -> list[Graph]:
    made = virtual.pairs(model)
    with virtual.silent(model):
        return [virtual.begun(graph, made) for graph in build.graphs(model, task)]


def _encoder(model: nn.Module, task: Task) -> list[Graph]:
    """The model as it runs; what it says of single tokens begins with the first real one."""
    with virtual.silent(model):
        plain = build.graphs(model, task)
    more = virtual.rows(model)
    return [replace(graph, module=Cut(graph.module, graph.outputs, more)) for graph in plain]


class Cut(nn.Module):
    """A graph's module, whose outputs for each token leave out those of virtual tokens."""

    def __init__(self, inner: nn.Module, outputs: dict[str, Axes], more: int):
        super().__init__()
        self.inner, self.config, self.more = inner, inner.config, more
        self.long = {name for name, axes in outputs.items() if axes.get(1) == SEQUENCE}

    @property
    def model(self) -> nn.Module:
        """The model inside."""
        return self.inner.model

    def forward(self, **words: Tensor) -> dict[str, Tensor]:
        return {n: v[:, self.more :] if n in self.long else v for n, v in self.inner(**words).items()}


HEARD = "encoder_output_length"


def _seq2seq(model: nn.Module, task: Task) -> list[Graph]:
    """The model as it runs: the encoder says more than it was given, or the first step's cache is longer than its text."""
    return [replace(g, axes=_longer(g.axes), outputs=_longer(g.outputs)) for g in build.graphs(model, task)]


def _longer(axes: dict[str, Axes]) -> dict[str, Axes]:
    def name(value: str, i: int, axis: str) -> str:
        inside = value in ("encoder_hidden_states", "last_hidden_state") or ".encoder." in value
        if axis == BATCH or not inside and ".decoder." not in value:
            return axis
        return HEARD if inside else f"{axis}_and_prefix"

    return {value: {i: name(value, i, axis) for i, axis in dims.items()} for value, dims in axes.items()}
