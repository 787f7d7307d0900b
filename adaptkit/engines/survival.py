"""What rounding to the stored dtype left of an update: |stored(W + D) - (W + D)| beside |D|, block by block and added up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .plan import Target


@dataclass(frozen=True)
class Look:
    """What rounding to the stored dtype left of the update in one block, in squared norms.

    update: |D|^2      lost: |stored(W + D) - (W + D)|^2      alone: |D_k|^2 of each adapter that acts there
    zero: whether the base is all zero there
    numbers: how many there are, 0 when the norm of the whole update is known without looking
    """

    tensor: str
    first: int
    update: float
    lost: float
    alone: dict[int, float]
    zero: bool
    numbers: int = 0


@dataclass
class Survival:
    """Looks, added up. Plain values, so that a journal can hold them.

    adapters: position -> [|D_k|^2, what rounding lost where it acts].    worst: [tensor, share lost], the largest first.
    tensors: name -> [|D|^2 of what was seen, how many numbers], where the norm is not known from factors.
    """

    update: float = 0.0
    lost: float = 0.0
    adapters: dict[str, list[float]] = field(default_factory=dict)
    worst: list[list] = field(default_factory=list)
    zero: bool = True  # nothing but zeros was seen
    tensors: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Survival:
        """Added up in one order, whichever thread looked first, so that the sums are the same every time."""
        total, by_tensor = cls(), {}
        for look in sorted(looks, key=lambda x: (x.tensor, x.first)):
            total.zero = total.zero and look.zero
            if not math.isfinite(look.update + look.lost):
                continue  # NaN in the base has its own warning
            total._add(look.update, look.lost, {str(k): [v, look.lost] for k, v in look.alone.items()})
            sums = by_tensor.setdefault(look.tensor, [0.0, 0.0])
            sums[0] += look.update
            sums[1] += look.lost
            if look.numbers:
                seen = total.tensors.setdefault(look.tensor, [0.0, 0])
                seen[0] += look.update
                seen[1] += look.numbers
        shares = [[name, share(lost, update)] for name, (update, lost) in by_tensor.items()]
        total.worst = sorted(shares, key=lambda x: (-x[1], x[0]))[:3]
        return total

    def add(self, other: Survival) -> None:
        """Another file's."""
        self._add(other.update, other.lost, other.adapters)
        self.worst = sorted(self.worst + other.worst, key=lambda x: (-x[1], x[0]))[:3]
        self.zero = self.zero and other.zero
        self.tensors |= other.tensors

    def _add(self, update: float, lost: float, adapters: dict[str, list[float]]) -> None:
        self.update += update
        self.lost += lost
        for k, (alone, eaten) in adapters.items():
            before = self.adapters.get(k, [0.0, 0.0])
            self.adapters[k] = [before[0] + alone, before[1] + eaten]


def share(lost: float, update: float) -> float:
    """|error of rounding| / |update| from their squares, between 0 and 1."""
    return min(1.0, (lost / update) ** 0.5) if update else 0.0


def looked(
    target: Target, first: int, before: np.ndarray, exact: np.ndarray, stored: np.ndarray, alone: dict[int, float]
) -> Look:
    """What one block says of rounding. alone: |D_k|^2 by adapter; of a single one it is the whole update's."""
    update, lost = square(exact - before), square(stored.astype(exact.dtype) - exact)
    adapters = {c.adapter for c in target.changes}
    alone = {adapters.pop(): update} if len(adapters) == 1 else alone
    return Look(target.name, first, update, lost, alone, not (before.any() or target.appended), exact.size)


def square(a: np.ndarray) -> float:
    flat = a.reshape(-1)
    return float(np.dot(flat, flat))
