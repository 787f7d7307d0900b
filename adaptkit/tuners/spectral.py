"""LoRA whose start changed the base weight: PiSSA, OLoRA, KaSA. The change is computed again, then B A is added.

PiSSA, Meng et al. 2024, https://arxiv.org/abs/2404.02948        W' = (W - U_r S_r V_r) + s B A
OLoRA, Buyukakyuz 2024, https://arxiv.org/abs/2406.01775          W' = (W - s Q_r R_r) + s B A,  Q R the stored matrix
KaSA, Wang et al. 2024, https://arxiv.org/abs/2412.06071          W' = (W - its r smallest components) + s B diag(d) A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner
from .dora import renormed
from .lora import LoRA


@dataclass(frozen=True)
class _Spectral(LoRA):
    noise = 512.0  # two float32 decompositions agree no better
    follows = False  # the start was computed from the unchanged base weight

    def init(self, base: Any) -> Params:
        return Tuner.init(self, base)  # refuses: LoRA's start would not be a no-op here

    def removed(self, W: Array) -> Array:
        """What the start took out of the stored matrix W."""
        raise NotImplementedError

    def weight(self, W: Array, p: Params) -> Array:
        if W.ndim != 2:
            raise Mismatch(f"{self.name} is defined for matrices, the model's weight is {list(W.shape)}")
        V = super().weight(W - self.removed(W), p)
        return renormed(V, p["m"], self.transposed) if "m" in p else V  # DoRA on such a start

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        return Tuner.forward(self, base, p, *args, **kwargs)

    def factors(self, p: Params) -> None:
        return None

    def inverse(self, p: Params) -> tuple[Tuner, Params]:
        return Tuner.inverse(self, p)


@dataclass(frozen=True)
class PiSSA(_Spectral):
    """W' = (W - U_r S_r V_r) + s B A     U S V: the singular value decomposition of W"""

    name = "pissa"

    def removed(self, W: Array) -> Array:
        U, S, V = _linalg(W).svd(W, full_matrices=False)
        return (U[:, : self.r] * S[: self.r]) @ V[: self.r]


@dataclass(frozen=True)
class OLoRA(_Spectral):
    """W' = (W - s Q_r R_r) + s B A     Q R: the QR decomposition of the stored matrix"""

    name = "olora"

    def removed(self, W: Array) -> Array:
        Q, R = _linalg(W).qr(W)
        return self.scale * (Q[:, : self.r] @ R[: self.r])


@dataclass(frozen=True)
class KaSA(_Spectral):
    """W' = (W - its r smallest singular components) + s B diag(d) A     d: (r,)"""

    name = "kasa"

    def removed(self, W: Array) -> Array:
        U, S, V = _linalg(W).svd(W, full_matrices=False)
        return (U[:, -self.r :] * S[-self.r :]) @ V[-self.r :]

    def weight(self, W: Array, p: Params) -> Array:
        return super().weight(W, {**p, "B": p["B"].reshape(-1, self.r) * p["d"].reshape(1, -1)})

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> LoRA:
        if shapes["d"] != (self.r,):
            raise Mismatch(f"the diagonal has shape {list(shapes['d'])}, the rank is {self.r}")
        return super().fit(shape, shapes, square)


def _linalg(W: Array) -> Any:
    """The linear algebra of the library that W belongs to; `svd` and `qr` have one spelling in both."""
    if type(W).__module__.startswith("torch"):
        import torch

        return torch.linalg
    import numpy as np

    return np.linalg
