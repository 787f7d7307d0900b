"""Tied: the other end of a tied matrix, where rows that an adapter trains are seen too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .adapted import Adapted


class Tied(Adapted):
    """A module that shares its weight with an adapted one, and the adapters with it. It owns nothing.

    other: the wrapper of the module that is adapted.
    """

    def __init__(self, base_layer: nn.Module, other: Adapted):
        super().__init__(base_layer)
        object.__setattr__(self, "other", other)  # not a child: its numbers stand in one place
        self.tuners = other.tuners
        self.active = list(other.active)

    def of(self, name: str) -> Mapping[str, Tensor]:
        return self.other.of(name)


def other_end(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """The output head of a transformers model, when it shares the weight of this embedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    while isinstance(head, Adapted):
        head = head.base_layer
    if head is None or head is module or getattr(head, "weight", None) is not module.weight:
        return None
    return head
