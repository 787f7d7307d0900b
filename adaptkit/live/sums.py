"""W' = W + sum of s L R, a block of rows at a time, each block summed one size up and rounded once.

A block stays in the processor's cache between being widened, added to and rounded; a dense update never exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapted import Adapted

BLOCK = 1 << 20  # numbers; measured: 2^18 to 2^20 are equal, smaller ones pay for calls, larger ones leave the cache
Factors = tuple[Tensor, Tensor, float]


def factors(module: Adapted, names: Sequence[str], wide: torch.dtype) -> list[Factors] | None:
    """What adapters add to the stored weight, as thin factors; None when one of them does more than add."""
    found = []
    for name in names:
        p = {k: v.to(wide) if v.is_floating_point() else v for k, v in module.of(name).items()}
        thin = module.tuners[name].factors(p)
        if thin is None:
            return None
        found.append(thin)
    return found


def added(W: Tensor, thin: Sequence[Factors], wide: torch.dtype, into: Tensor) -> Tensor:
    """W + sum of s L R, written into a tensor like W, which may be W itself."""
    rows, flat, out = W.shape[0], W.reshape(W.shape[0], -1), into.view(W.shape[0], -1)
    device = W.device
    thin = [(L.to(device), R.to(device), s) for L, R, s in thin]
    step = max(1, (BLOCK if device.type == "cpu" else 64 * BLOCK) // max(1, flat.shape[1]))
    space = torch.empty(min(step, rows), flat.shape[1], dtype=wide, device=device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = space[: stop - start].copy_(flat[start:stop])
        for L, R, s in thin:
            block.addmm_(L[start:stop], R, alpha=s)
        out[start:stop] = block
    return into


def reach(W: Tensor, thin: Sequence[Factors]) -> float:
    """A bound on the largest absolute value of W + sum of s L R, by Cauchy and Schwarz; NaN where W has one."""
    low, high = (float(v) for v in W.aminmax())
    grown = sum(abs(s) * float(L.norm(dim=1).amax()) * float(R.norm(dim=0).amax()) for L, R, s in thin)
    return max(abs(low), abs(high)) + grown
