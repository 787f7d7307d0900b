"""LoRA whose start changed the base weight: PiSSA, OLoRA, KaSA. The change is computed again, then B A is added.

PiSSA, Meng et al. 2024, https://arxiv.org/abs/2404.02948        W' = (W - U_r S_r V_r) + s B A
OLoRA, Buyukakyuz 2024, https://arxiv.org/abs/2406.01775          W' = (W - s Q_r R_r) + s B A,  Q R the stored matrix
KaSA, Wang et al. 2024, https://arxiv.org/abs/2412.06071          W' = (W - its r smallest components) + s B diag(d) A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import Mismatch
from .base import Array, Params, Tuner
from .dora import DoRA, renormed
from .lora import LoRA


@dataclass(frozen=True)
class _Spectral(LoRA):
    noise = 512.0  # two float32 decompositions agree no better
    follows = False  # the start was computed from the unchanged base weight

    def init(self, base: Any) -> Params:
        kept = self.start(base)
        return {"A": kept["A0"].clone(), "B": kept["B0"].clone(), **kept}

    def start(self, base: Any) -> Params:
        """A0: (r, in)   B0: (out, r)   what the start took out of the weight, as factors that never train."""
        W = base.weight.detach().float()
        if W.ndim != 2 or self.embedding:
            raise Mismatch(f"{self.name} is defined for linear layers, not for a {type(base).__name__}")
        B, A = self.taken(W.T if self.transposed else W)
        return {"A0": A.contiguous(), "B0": B.contiguous()}

    def taken(self, W: Array) -> tuple[Array, Array]:
        """B0, A0: s B0 A0 is what the start takes out of W. W: (out, in), a torch tensor"""
        raise Mismatch(f"{self.name} cannot be started on a live model")

    def trains(self, letter: str, value: Any) -> bool:
        return letter not in ("A0", "B0") and super().trains(letter, value)

    def removed(self, W: Array) -> Array:
        """What the start took out of the stored matrix W."""
        raise NotImplementedError

    def weight(self, W: Array, p: Params) -> Array:
        if W.ndim != 2:
            raise Mismatch(f"{self.name} is defined for matrices, the model's weight is {list(W.shape)}")
        L, R, s = LoRA.factors(self, {"A": p["A0"], "B": p["B0"]}) if "A0" in p else (None, None, 1.0)
        V = super().weight(W - (self.removed(W) if L is None else s * (L @ R)), p)
        return renormed(V, p["m"], self.transposed) if "m" in p else V  # DoRA on such a start

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        if "A0" in p and "m" not in p:
            return super().forward(base, p, *args, **kwargs)
        return Tuner.forward(self, base, p, *args, **kwargs)

    def kept(self, p: Params) -> tuple[Tuner, Params]:
        """Without what the start took out, which the base weight tells again; with it, where that was random."""
        mine = {k: v for k, v in p.items() if k not in ("A0", "B0")}
        if "A0" not in p or getattr(self, "niter", None) is None:
            return self, mine
        import torch

        wide = {"A": torch.cat([p["A"], p["A0"]]), "B": torch.cat([p["B"], -p["B0"]], dim=1)}
        times = 2**0.5 if self.rslora else 2
        kind = DoRA if "m" in p else LoRA
        common = {f.name: getattr(self, f.name) for f in fields(LoRA)}
        return kind(**{**common, "r": 2 * self.r, "alpha": times * self.alpha}), {**mine, **wide}

    def factors(self, p: Params) -> None:
        return None

    def inverse(self, p: Params) -> tuple[Tuner, Params]:
        return Tuner.inverse(self, p)


@dataclass(frozen=True)
class PiSSA(_Spectral):
    """W' = (W - U_r S_r V_r) + s B A     U S V: the singular value decomposition of W"""

    name = "pissa"

    niter: int | None = None  # power steps of a randomised decomposition, whose outcome no file can repeat

    def removed(self, W: Array) -> Array:
        U, S, V = _linalg(W).svd(W, full_matrices=False)
        return (U[:, : self.r] * S[: self.r]) @ V[: self.r]

    def taken(self, W: Array) -> tuple[Array, Array]:
        import torch

        if self.niter is None:
            U, S, V = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, self.r, niter=self.niter)
            V = V.T
        root = (S[: self.r] / self.scale) ** 0.5
        return U[:, : self.r] * root, root[:, None] * V[: self.r]


@dataclass(frozen=True)
class OLoRA(_Spectral):
    """W' = (W - s Q_r R_r) + s B A     Q R: the QR decomposition of the stored matrix"""

    name = "olora"

    def removed(self, W: Array) -> Array:
        Q, R = _linalg(W).qr(W)
        return self.scale * (Q[:, : self.r] @ R[: self.r])

    def taken(self, W: Array) -> tuple[Array, Array]:
        import torch

        if self.transposed:
            raise Mismatch("olora decomposes the stored matrix, whose factors do not fit a layer stored as (in, out)")
        Q, R = torch.linalg.qr(W)
        return Q[:, : self.r], R[: self.r]


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
