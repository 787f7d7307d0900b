"""Virtual tokens in a decoder's graph: keys and values that never change, before those of the user's tokens.

K' = [P_k; K], V' = [P_v; V], positions p' = p + n. Prefix tuning trained P_k and P_v themselves. Of a prompt they are what
the model makes of it once, since nothing that comes later changes how it reads its beginning. The first n are cut off
what is handed back, so to programs the graph is a decoder like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Mismatch
from ..live.tokens import standing
from ..live.virtual import Acting, cache
from .graph import Graph
from .wrappers import layers

Pair = tuple[Tensor, Tensor]  # keys and values of a layer, (1, heads, n, width of a head)


class Begun(nn.Module):
    """A decoder graph's module that goes on from keys and values of its own."""

    def __init__(self, inner: nn.Module, pairs: Sequence[Pair]):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.count = pairs[0][0].shape[2]
        for i, (key, value) in enumerate(pairs):
            self.register_buffer(f"key_{i}", key)
            self.register_buffer(f"value_{i}", value)

    @property
    def model(self) -> nn.Module:
        """The model inside."""
        return self.inner.model

    def forward(self, **words: Any) -> dict[str, Any]:
        n, mask, past = self.count, words["attention_mask"], words["past_key_values"]
        words["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)
        words["past_key_values"] = {i: self._after(i, layer) for i, layer in past.items()}
        if "position_ids" in words:
            words["position_ids"] = words["position_ids"] + n
        with silent(self.model):
            said = self.inner(**words)
        said["present"] = {i: {k: v[:, :, n:] for k, v in layer.items()} for i, layer in said["present"].items()}
        return said

    def _after(self, i: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The user's past of a layer after the virtual tokens'."""
        mine = {k: getattr(self, f"{k}_{i}") for k in layer}
        return {k: torch.cat([mine[k].expand(v.shape[0], -1, -1, -1), v], 2) for k, v in layer.items()}


def begun(graph: Graph, pairs: Sequence[Pair]) -> Graph:
    """The same graph after virtual tokens. Raises Mismatch when they are not for as many layers as its past."""
    there = len(graph.sample["past_key_values"])
    if len(pairs) != there:
        raise Mismatch(
            f"virtual tokens for {len(pairs)} layers, the model keeps {there}", hint="is it made for another model?"
        )
    return replace(graph, module=Begun(graph.module, pairs))


def acting(model: nn.Module) -> Acting | None:
    """The virtual tokens that act on a live model."""
    here = standing(model)
    return here.acting() if here is not None else None


def count(model: nn.Module) -> int:
    """How many positions virtual tokens take."""
    found = acting(model)
    return found.tokens if found is not None else 0


def rows(model: nn.Module) -> int:
    """How many rows virtual tokens put before those of a text; a prefix puts keys and values."""
    found = acting(model)
    return found.tokens if found is not None and found.name != "prefix" else 0


@contextlib.contextmanager
def silent(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its virtual tokens."""
    here = standing(model)
    before = here is not None and here.enabled
    if here is not None:
        here.enabled = False
    try:
        yield model
    finally:
        if here is not None:
            here.enabled = before


@torch.no_grad()
def pairs(model: nn.Module) -> list[Pair]:
    """Keys and values of the virtual tokens that act on a model, layer by layer."""
    found = acting(model)
    made = cache(model, found, 1) if found.name == "prefix" else _read(model, found)
    return [(layer["key"].contiguous(), layer["value"].contiguous()) for layer in layers(made).values()]


def _read(model: nn.Module, found: Acting) -> Any:
    """What a model keeps of a prompt: all of it, whatever its windows."""
    from transformers import DynamicCache

    kept, first = DynamicCache(), next(model.parameters())
    prompt = found.rows()[: found.tokens].to(first.device, first.dtype)
    with silent(model):
        model(inputs_embeds=prompt[None], past_key_values=kept, use_cache=True)
    return kept
