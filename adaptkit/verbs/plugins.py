"""plugins: which tuners and formats are installed, and whose they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from .. import registry
from ..errors import AdaptKitError


@dataclass
class Plugin:
    """An installed tuner or format.

    about: the first line of its documentation, or why it cannot be used.
    can: what a format does, "read" and "write".    cannot: what it cannot hold.
    """

    name: str
    kind: str
    package: str
    about: str
    broken: bool = False
    can: list[str] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)


def plugins() -> list[Plugin]:
    """List the installed tuners and formats."""
    return [_described(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


def _described(kind: str, name: str) -> Plugin:
    try:
        package = registry.package(registry.point(kind, name))
        found = registry.load(kind, name)
        about = Plugin(name, registry.KINDS[kind], package, _about(found))
        return _able(about, found) if kind == "formats" else about
    except AdaptKitError as e:
        return Plugin(name, registry.KINDS[kind], ", ".join(registry.owners(kind, name)), str(e), broken=True)


def _able(about: Plugin, found: type) -> Plugin:
    """What a format does. One that has no `write` of its own has the one that refuses."""
    about.can = ["read"] if found.write.__qualname__ == "Format.write" else ["read", "write"]
    about.cannot = list(found.cannot)
    return about


def _about(found: type) -> str:
    """The first line of a class's documentation, or of its module's."""
    text = found.__doc__ or sys.modules[found.__module__].__doc__ or ""
    return text.strip().partition("\n")[0]
