"""signed: a class whose forward has the signature of the model inside. Trainers read there which columns of a batch to keep."""

from __future__ import annotations

import functools
import inspect
from typing import Any

INSIDE = "_adaptkit_signed"  # on a class made here: the class it was made from, and that of the model


@functools.cache
def signed(kind: type, model: type) -> type:
    """A subclass of `kind` under the same name, whose forward says that it takes what the model's own takes.

    A forward that somebody else wrote is left alone: it takes what it says.
    """
    kind = public(kind)
    method = kind.forward  # type: ignore[attr-defined]
    if method.__module__.rpartition(".")[0] != __package__:
        return kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    forward.__doc__ = method.__doc__
    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (kind,), {**about, "forward": forward, INSIDE: (kind, model)})


def public(kind: type) -> type:
    """The class that people import."""
    return getattr(kind, INSIDE, (kind,))[0]


def blank(kind: type, model: type) -> Any:
    """An instance without contents: what pickle begins with, since it finds no class by a name that two have."""
    made = signed(kind, model)
    return made.__new__(made)
