"""plugins: which tuners and formats are installed, and whose they are."""

from __future__ import annotations

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
        found = registry.load(kind, name)
        return Plugin(name, registry.KINDS[kind], package, (found.__doc__ or "").strip().partition("\n")[0])
    except AdaptKitError as e:
        return Plugin(name, registry.KINDS[kind], "?", str(e), broken=True)
