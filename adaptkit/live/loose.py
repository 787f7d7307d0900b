"""Tensors of a model that an adapter replaces outright, in place: trained biases, norms, heads.

While the adapter acts, the parameter holds the adapter's value and the old one is kept aside; else the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import Mismatch, quoted, some

NOTE = "_adaptkit_loose"


class Loose:
    """What one adapter replaces.

    aside: by parameter path, the value that the model does not hold now.    trains: the flag that goes with it.
    """

    def __init__(self, aside: dict[str, Tensor], trains: bool) -> None:
        self.aside = aside
        self.trains = dict.fromkeys(aside, trains)
        self.acts = False

    def swap(self, model: nn.Module, acts: bool) -> None:
        """Let the adapter's values act, or the old ones."""
        if acts == self.acts:
            return
        for path, other in self.aside.items():
            parameter = model.get_parameter(path)
            self.aside[path], parameter.data = parameter.data, other.to(parameter.device, parameter.dtype)
            flag, self.trains[path] = self.trains[path], parameter.requires_grad
            parameter.requires_grad_(flag)
        self.acts = acts

    def train(self, model: nn.Module, path: str, trains: bool) -> None:
        """Let the adapter's value train, or freeze it."""
        if self.acts:
            model.get_parameter(path).requires_grad_(trains)
        else:
            self.trains[path] = trains


def of(model: nn.Module) -> dict[str, Loose]:
    """What adapters replace outright in a model, by adapter name."""
    return model.__dict__.get(NOTE, {})


def replace(model: nn.Module, name: str, values: Mapping[str, Tensor | None], trains: bool = True) -> None:
    """Give parameters a value that goes with an adapter; None starts from the model's own. Acts at once.

    Raises Mismatch for a path that is no parameter of the model, a shape that differs, or two adapters on one parameter.
    """
    aside, seen = dict[str, Tensor](), dict[int, str]()
    for path, value in values.items():
        parameter = _parameter(model, path)
        if taken := [n for n, other in of(model).items() if path in other.aside and n != name]:
            raise Mismatch(f"{quoted(path)} is replaced by {some(taken)} already", hint="detach it first")
        if value is not None and value.shape != parameter.shape:
            hint = "resize its embeddings first" if parameter.ndim == 2 else ""
            raise Mismatch(f"{quoted(path)} is {list(value.shape)}, the model has {list(parameter.shape)}", hint=hint)
        value = parameter.data.clone() if value is None else value.to(parameter.dtype)
        if (twin := seen.get(id(parameter))) is None:
            seen[id(parameter)], aside[path] = path, value
        elif not torch.equal(aside[twin], value):
            raise Mismatch(
                f"{quoted(twin)} and {quoted(path)} are one tensor of this model, and the adapter holds two",
                hint="merge it on files, where they become two",
            )
    made = model.__dict__.setdefault(NOTE, {})[name] = Loose(aside, trains)
    made.swap(model, True)


def take(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Give the model its own values back; the adapter's are returned."""
    if name not in of(model):
        return {}
    loose = _pop(model, name)
    loose.swap(model, False)
    return loose.aside


def keep(model: nn.Module, name: str) -> list[str]:
    """Leave an adapter's values in the model for good; their paths."""
    loose = _pop(model, name)
    loose.swap(model, True)
    for path, flag in loose.trains.items():
        model.get_parameter(path).requires_grad_(flag)
    return list(loose.aside)


def _pop(model: nn.Module, name: str) -> Loose:
    loose = model.__dict__[NOTE].pop(name)
    if not model.__dict__[NOTE]:
        del model.__dict__[NOTE]
    return loose


def act(model: nn.Module, names: Iterable[str]) -> None:
    """Let the values of these adapters act, and no others."""
    names = list(names)
    for name, loose in of(model).items():
        loose.swap(model, name in names)


def acting(model: nn.Module) -> list[str]:
    """The adapters whose values act at the moment."""
    return [name for name, loose in of(model).items() if loose.acts]


def _parameter(model: nn.Module, path: str) -> torch.nn.Parameter:
    try:
        return model.get_parameter(path)
    except AttributeError:
        raise Mismatch(f"{quoted(path)} is not a parameter of this model", hint="is it made for another one?") from None
