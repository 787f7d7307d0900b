"""Graph: one ONNX file to be. A module, a sample of its inputs, and what their axes are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Axes = Mapping[int, str]
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass
class Graph:
    """What is traced into one file.

    name: of the file, without its ending.    module: takes the sample's words, gives a (nested) dict of tensors.
    sample: inputs by name; a dict inside is flattened to dotted names, past_key_values.0.key.
    axes: of each flat input, the dimensions that may have any size, and their names.    outputs: the same, in order.
    slots: shapes of the inputs that an adapter fills, None where any size goes; the others do without them.
    """

    name: str
    module: nn.Module
    sample: dict[str, Any]
    axes: dict[str, Axes]
    outputs: dict[str, Axes] = field(default_factory=dict)
    slots: Mapping[str, Sequence[int | None]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[str]:
        """The flat names of the inputs, in order."""
        return [name for name, _ in flat(self.sample)]

    def fresh(self) -> dict[str, Any]:
        """The sample in dicts of its own, since tracing may change them."""
        return nested(flat(self.sample))

    def shapes(self, word: Any) -> dict[str, Any]:
        """For torch.export, which dimensions are dynamic. word: what stands for one, given its name."""
        marks = [(name, {d: word(axis) for d, axis in self.axes.get(name, {}).items()}) for name in self.inputs]
        return nested(marks)


def flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """A nested dict as dotted names and what stands there."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def nested(pairs: Any) -> dict[str, Any]:
    """The opposite of flat."""
    tree: dict[str, Any] = {}
    for name, value in pairs:
        *above, leaf = name.split(".")
        here = tree
        for part in above:
            here = here.setdefault(part, {})
        here[leaf] = value
    return tree


def values(tree: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a nested dict."""
    return [value for _, value in flat(tree)]
