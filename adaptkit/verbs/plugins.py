"""plugins: which tuners and formats are installed, and whose they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .. import registry
from ..errors import AdaptKitError


@dataclass
class Plugin:
    """An installed tuner or format. about: the first line of its documentation, or why it cannot be used."""

    name: str
    kind: str
    package: str
    about: str
    broken: bool = False


def plugins() -> list[Plugin]:
    """List the installed tuners and formats."""
    return [_described(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


def _described(kind: str, name: str) -> Plugin:
    try:
        package = registry.package(registry.point(kind, name))
        return Plugin(name, registry.KINDS[kind], package, _about(registry.load(kind, name)))
    except AdaptKitError as e:
        return Plugin(name, registry.KINDS[kind], ", ".join(registry.owners(kind, name)), str(e), broken=True)


def _about(found: type) -> str:
    """The first line of a class's documentation, or of its module's."""
    text = found.__doc__ or sys.modules[found.__module__].__doc__ or ""
    return text.strip().partition("\n")[0]
