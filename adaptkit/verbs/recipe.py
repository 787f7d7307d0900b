"""Recipe: how adapters are combined, with every option checked against the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Usage, quoted
from ..store.checkpoint import warn
from .inputs import weights_of, workers_of

BLENDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
METHODS += ("magnitude_prune", "magnitude_prune_svd")
LARGEST_RANK = 65_536


@dataclass(frozen=True)
class Recipe:
    """method: one of METHODS.    weights: one for each adapter.    rank: None for the largest of the inputs', per site.

    workers: threads of the methods that need dense matrices.
    """

    method: str
    weights: tuple[float, ...]
    rank: int | None
    clamp: float | None
    density: float
    majority: str
    seed: int
    device: str
    workers: int

    @property
    def blend(self) -> str:
        """The method without its ending."""
        return self.method.removesuffix("_svd")

    @property
    def is_svd(self) -> bool:
        return self.method.endswith("svd")


def recipe(
    count: int,
    method: str,
    weights: Sequence[float] | None,
    rank: int | None,
    clamp: float | None,
    density: float | None,
    majority: str,
    seed: int,
    device: str,
    workers: int | None = None,
) -> Recipe:
    """The options as a Recipe. Raises Usage for one that makes no sense, or that the method has no use for."""
    if method not in METHODS:
        raise Usage(f"{quoted(method)!r} is not one of {', '.join(METHODS)}", where="--method")
    if not method.endswith("svd"):
        for option, value in (("--rank", rank), ("--clamp", clamp)):
            if value is not None:
                raise Usage(f"{method} makes no use of it, only the svd methods do", where=option)
    rank_of(rank)
    if clamp is not None and not 0 < clamp <= 1:
        raise Usage(f"{clamp} is not a quantile above 0 and up to 1", where="--clamp")
    if clamp is not None and clamp <= 0.5:
        warn(
            f"--clamp {clamp:g} cuts at or below zero, half of the numbers being negative: one number is left of the update"
        )
    return Recipe(
        method, tuple(weights_of(weights, count)), rank, clamp, _density(method, density), _majority(method, majority),
        int(seed), device, workers_of(workers),
    )  # fmt: skip


def rank_of(rank: int | None, where: str = "--rank") -> int | None:
    """A rank that can be, or None."""
    if rank is not None and not 1 <= rank <= LARGEST_RANK:
        raise Usage(f"{rank} is not a rank between 1 and {LARGEST_RANK}", where=where)
    return rank


def how_thin(rank: int | None, energy: float | None, max_rank: int | None) -> None:
    """Raises Usage unless a rank is given, or an energy that max_rank may bound."""
    if (rank is None) == (energy is None):
        raise Usage("give either --rank or --energy", hint="such as --rank 16")
    rank_of(rank)
    rank_of(max_rank, "--max-rank")
    if rank is not None and max_rank is not None:
        raise Usage("bounds what --energy asks for; --rank is given already", where="--max-rank")
    if energy is not None and not 0 < energy <= 1:
        raise Usage(f"{energy} is not a share above 0 and up to 1", where="--energy", hint="write it as 0.95")


def _density(method: str, density: float | None) -> float:
    prunes = method not in ("svd", "linear", "cat")
    if density is not None and not prunes:
        raise Usage(f"{method} drops nothing", where="--density")
    if prunes and density is None:
        raise Usage(f"{method} needs it", where="--density", hint="say which share is kept, such as 0.5")
    if density is not None and not (math.isfinite(density) and 0 < density <= 1):
        raise Usage(f"{density} is not above 0 and up to 1", where="--density")
    return 1.0 if density is None else float(density)


def _majority(method: str, majority: str) -> str:
    if majority not in ("total", "frequency"):
        raise Usage(f"{quoted(majority)!r} is not one of total, frequency", where="--majority-sign")
    if majority != "total" and "ties" not in method:
        raise Usage(f"{method} elects no sign", where="--majority-sign")
    return majority
