"""Wrapper: a module in the place of another one, through which adapters act by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import Mismatch


class Wrapper(nn.Module):
    """What adapted modules and replaced modules have in common.

    active: names that act, in order.    enabled: whether any does.
    rows: the adapter of each sample of the batch, where they differ; a name that is not here means none.
    repeated: whether a batch may hold each sample several times in a row, as beams do.
    merged_adapters: names whose update is in the base's weight at the moment, in the order in which they went in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self.merged_adapters: list[str] = []
        self.enabled = True
        self.rows: list[str] | None = None
        self.repeated = False

    def names(self) -> Collection[str]:
        """The adapters that are here."""
        raise NotImplementedError

    def bare(self) -> nn.Module:
        """The module as it is without adapters."""
        raise NotImplementedError

    def through(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """What the module computes with these adapters acting, in order."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None and self.enabled:
            return self._by_rows(self.rows, *args, **kwargs)
        return self.through(self.active if self.enabled else (), *args, **kwargs)

    def _by_rows(self, rows: Sequence[str], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Each group of samples through its own adapter."""
        times, rest = divmod(len(x), len(rows))
        if rest or not times or (times > 1 and not self.repeated):
            raise Mismatch(f"{len(rows)} adapter_names for a batch of {len(x)}")
        groups: dict[str, list[int]] = {}
        for i in range(len(x)):
            groups.setdefault(rows[i // times], []).append(i)
        if len(groups) == 1:
            return self.through(self._here(rows[0]), x, *args, **kwargs)
        if any(isinstance(more, torch.Tensor) for more in (*args, *kwargs.values())):
            raise Mismatch(
                f"adapter_names cannot differ in a batch through {type(self.bare()).__name__}: it reads more"
            )
        parts = [self.through(self._here(name), x[index], *args, **kwargs) for name, index in groups.items()]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise Mismatch(f"adapter_names cannot differ in a batch through {type(self.bare()).__name__}")
        order = [i for index in groups.values() for i in index]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[back]

    def _here(self, name: str) -> tuple[str, ...]:
        return (name,) if name in self.names() else ()
