"""Tuner: hyperparameters and a few short functions. A tuner never owns tensors.

Write `init` and `weight`, and training, running and merging follow. Override the rest to be fast or to say more.
Formulas use operators that NumPy arrays and torch tensors share where `arrays` is "any"; a tuner that needs torch
functions leaves it at "torch".
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from ..errors import Mismatch

Array = Any  # numpy.ndarray or torch.Tensor
Params = Mapping[str, Array]


class Tuner(ABC):
    """One way to adapt a weight. Subclasses are frozen dataclasses of hyperparameters."""

    name: ClassVar[str]
    arrays: ClassVar[str] = "torch"  # what `weight` computes with: "any" or "torch"
    noise: ClassVar[float] = 1.0  # float32 roundings that a sound float32 program may be away from the exact weight
    of_rows: ClassVar[bool] = False  # replaces rows of an embedding, and so columns of a head that is tied to it
    inside: ClassVar[bool] = False  # runs as a changed parameter, whatever its module does with that
    follows: ClassVar[bool] = True  # may come after another adapter's change of the same weight

    def init(self, base: Any) -> Params:
        """Fresh numbers for one module; must start as a no-op."""
        raise Mismatch(f"{self.name} cannot be started on a {type(base).__name__}")

    def start(self, base: Any) -> Params:
        """Numbers that belong to the module and are in no file; `init` makes them too."""
        return {}

    def trains(self, letter: str, value: Any) -> bool:
        """Whether a param is one that training changes."""
        return value.is_floating_point()

    def kept(self, p: Params) -> tuple[Tuner, Params]:
        """This tuner and its params as they leave the module."""
        return self, p

    def weight(self, W: Array, p: Params) -> Array:
        """The weight after adaptation, in the shape of W."""
        raise Mismatch(
            f"{self.name} has no weight to merge into: it acts on activations",
            hint="keep it as an adapter, or let adaptkit export-onnx carry it",
        )

    def bias(self, b: Array, p: Params) -> Array:
        """The bias after adaptation. b: (out,)"""
        return b

    def forward(self, base: Any, p: Params, *args: Any, **kwargs: Any) -> Any:
        """What the adapted module computes. base: the torch module, or the adapters before this one.

        Runs the module with `weight` and `bias` in the place of its own, so running is merging; override it to be fast.
        """
        from torch.func import functional_call

        if not hasattr(base, "named_parameters"):
            raise Mismatch(f"{self.name} must be the first adapter on a module: it changes the weight itself")
        parts = {}
        for name, value in base.named_parameters(recurse=False):
            wide = value.to(next(iter(p.values())).dtype) if value.dtype.itemsize < 4 else value
            parts[name] = getattr(self, name)(wide, p).to(value.dtype) if name in ("weight", "bias") else value
        return functional_call(base, parts, args, kwargs)

    def changes_bias(self, p: Params) -> bool:
        """Whether `bias` does anything with these params."""
        return False

    def factors(self, p: Params) -> tuple[Array, Array, float] | None:
        """(L, R, s) when `weight` adds s L R to the stored matrix. L: (rows, r)  R: (r, columns). None when it does not."""
        return None

    def rows(self, p: Params, start: int, stop: int) -> Params | None:
        """The params that belong to rows start:stop of the stored weight; None when `weight` needs all rows at once."""
        return None

    def fit(self, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], square: bool = False) -> Tuner:
        """This tuner, made to fit a stored weight of `shape`. shapes: of the params.

        square: how a square weight is to be read, when the shapes cannot tell: True for (in, out).
        Raises Mismatch with both shapes when it cannot fit.
        """
        return self

    def inverse(self, p: Params) -> tuple[Tuner, Params]:
        """A tuner and params that undo this one."""
        raise Mismatch(
            f"{self.name} cannot be taken out of a weight again: the old values are gone", hint="keep the base model"
        )

    def settings(self) -> dict[str, Any]:
        """The hyperparameters, as plain values."""
        return asdict(self)  # type: ignore[call-overload]
