"""Tuners and formats by name: entry points in the groups `adaptkit.tuners` and `adaptkit.formats`.

Listed from metadata, imported on first use. The built-in ones come in by the same door as everyone else's.
"""

from __future__ import annotations

import difflib
import os
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from .errors import AdaptKitError, AdaptKitWarning, Mismatch, quoted

KINDS = {"tuners": "tuner", "formats": "format"}
OURS = "adaptkit"


@cache
def catalogue(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Every claim on every name of one kind, as the installed packages declare them; nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"adaptkit.{kind}"):
        if package(point) == OURS or not os.environ.get("ADAPTKIT_NO_PLUGINS"):
            claims = found.setdefault(point.name, [])
            if all(package(p) != package(point) for p in claims):  # a folder listed twice on sys.path is one claim
                claims.append(point)
    return {name: tuple(found[name]) for name in sorted(found)}


def names(kind: str) -> list[str]:
    """The names one can ask for: names("tuners") -> ["dora", "ia3", "lora", ...]."""
    return list(catalogue(kind))


def package(point: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return point.dist.name if point.dist else "?"


def point(kind: str, name: str) -> EntryPoint:
    """The one entry point behind a name. A built-in name cannot be taken by another package."""
    claims = catalogue(kind).get(name)
    if not claims:
        raise Mismatch(_unknown(kind, name))
    ours = [p for p in claims if package(p) == OURS]
    if len(claims) > 1 and not ours:
        owners = ", ".join(sorted(package(p) for p in claims))
        raise Mismatch(f"{KINDS[kind]} {name!r} is claimed by {owners}", hint="uninstall all but one")
    if len(claims) > 1:
        others = ", ".join(sorted(package(p) for p in claims if p not in ours))
        warnings.warn(f"{KINDS[kind]} {name!r} of {others} is ignored: the name is built in", AdaptKitWarning, stacklevel=2)
    return (ours or claims)[0]


@cache
def load(kind: str, name: str) -> type:
    """The class called `name`. Raises Mismatch with the reason when there is none, or it cannot be loaded."""
    where = point(kind, name)
    try:
        found = where.load()
    except ModuleNotFoundError as e:
        hint = f"pip install adaptkit[{name}]" if package(where).startswith(OURS) else f"pip install {e.name}"
        raise Mismatch(f"{KINDS[kind]} {name!r} needs {e.name}", hint=hint) from e
    except AdaptKitError:
        raise
    except (Exception, SystemExit) as e:  # whatever a stranger's module does on import, we say whose it was
        raise Mismatch(f"{KINDS[kind]} {name!r} of {package(where)} cannot be loaded: {quoted(e) or type(e).__name__}") from e
    if not isinstance(found, type) or getattr(found, "name", None) != name:
        raise Mismatch(f"{KINDS[kind]} {name!r} of {package(where)} is not a class with name = {name!r}")
    return found


def _unknown(kind: str, name: str) -> str:
    near = difflib.get_close_matches(name, names(kind), 1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"no {KINDS[kind]} named {quoted(name)!r}. {guess}Installed: {', '.join(names(kind))}"
