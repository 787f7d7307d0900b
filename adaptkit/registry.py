"""Tuners and formats by name: entry points in the groups `adaptkit.tuners` and `adaptkit.formats`.

Listed from metadata, imported on first use. The built-in ones come in by the same door as everyone else's.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

from .errors import AdaptKitError, AdaptKitWarning, Mismatch, quoted

KINDS = {"tuners": "tuner", "formats": "format"}
BASES = {"tuners": "adaptkit.tuners.base.Tuner", "formats": "adaptkit.formats.base.Format"}  # by name: they lie above
OURS = "adaptkit"


@cache
def catalogue(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Every claim on every name of one kind, as the installed packages declare them; nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(_declared(f"adaptkit.{kind}"), key=lambda p: package(p) != OURS):
        if package(point) == OURS or not os.environ.get("ADAPTKIT_NO_PLUGINS"):
            claims = found.setdefault(point.name, [])
            # a folder listed twice on sys.path is one claim, and so is one class that two packages ship
            if all(package(p) != package(point) and p.value != point.value for p in claims):
                claims.append(point)
    return {name: tuple(found[name]) for name in sorted(found)}


def names(kind: str) -> list[str]:
    """The names one can ask for: names("tuners") -> ["dora", "ia3", "lora", ...]."""
    return list(catalogue(kind))


def package(point: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return (point.dist and point.dist.name) or "?"


def owners(kind: str, name: str) -> list[str]:
    """The packages that claim a name."""
    return sorted(package(p) for p in catalogue(kind).get(name, ()))


def built_in(kind: str, name: str) -> bool:
    """Whether a name is one of ours, so that loading it runs nobody else's code."""
    return OURS in owners(kind, name)


def point(kind: str, name: str) -> EntryPoint:
    """The one entry point behind a name. A built-in name cannot be taken by another package."""
    claims = catalogue(kind).get(name)
    if not claims:
        raise Mismatch(_unknown(kind, name))
    ours = [p for p in claims if package(p) == OURS]
    if len(claims) > 1 and not ours:
        raise Mismatch(
            f"{KINDS[kind]} {name!r} is claimed by {', '.join(owners(kind, name))}", hint="uninstall all but one"
        )
    if len(claims) > 1:
        others = ", ".join(o for o in owners(kind, name) if o != OURS)
        warnings.warn(
            f"{KINDS[kind]} {name!r} of {others} is ignored: the name is built in", AdaptKitWarning, stacklevel=2
        )
    return (ours or claims)[0]


@cache
def load(kind: str, name: str) -> type:
    """The class called `name`. Raises Mismatch with the reason when there is none, or it cannot be loaded."""
    where = point(kind, name)
    whose = f"{KINDS[kind]} {name!r} of {package(where)}"
    found = _imported(where, whose)
    base = BASES[kind]
    if not isinstance(found, type) or base not in {f"{c.__module__}.{c.__qualname__}" for c in found.__mro__}:
        raise Mismatch(
            f"{whose} is {quoted(repr(found))}, not a {base.rpartition('.')[2]}", hint='write it as "module:Class"'
        )
    if getattr(found, "name", None) != name:
        raise Mismatch(
            f"{whose} calls itself {quoted(repr(getattr(found, 'name', None)))}", hint=f"set name = {name!r}"
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise Mismatch(f"{whose} does not define {', '.join(missing)}")
    return found


@contextlib.contextmanager
def blamed(kind: str, name: str) -> Iterator[None]:
    """Around a call into a tuner or format: when a stranger's code fails, the error says whose it is."""
    try:
        yield
    except AdaptKitError:
        raise
    except Exception as e:
        if built_in(kind, name):
            raise  # a bug of ours
        whose = ", ".join(owners(kind, name)) or "nobody"
        why = f"{type(e).__name__}: {quoted(e)}"
        raise Mismatch(
            f"{KINDS[kind]} {name!r} of {whose} failed ({why})", hint="tell its author; --debug shows where"
        ) from e


def _imported(where: EntryPoint, whose: str) -> object:
    """What an entry point leads to. Whatever a stranger's module does on import, we say whose it was."""
    if not where.pattern.match(where.value):
        raise Mismatch(f"{whose} has the entry point {quoted(where.value)!r}", hint='write it as "module:Class"')
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, and may be JSON
            return where.load()
    except AdaptKitError:
        raise
    except (Exception, SystemExit) as e:
        needed = getattr(e, "name", None) if isinstance(e, ModuleNotFoundError) else None
        if needed and needed.partition(".")[0] != where.module.partition(".")[0]:
            hint = f"pip install adaptkit[{where.name}]" if package(where) == OURS else f"pip install {needed}"
            raise Mismatch(f"{whose} needs {needed}", hint=hint) from e
        why = f"{type(e).__name__}: {quoted(e)}" if str(e) else type(e).__name__
        raise Mismatch(f"{whose} cannot be loaded ({why})") from e


def _declared(group: str) -> list[EntryPoint]:
    """The entry points of a group. A package whose list cannot be read does not spoil everyone else's."""
    try:
        return list(entry_points(group=group))
    except Exception:
        return [p for dist in distributions() for p in _readable(dist, group)]


def _readable(dist: Distribution, group: str) -> list[EntryPoint]:
    try:
        return list(dist.entry_points.select(group=group))
    except Exception as e:
        if group in _text(dist):
            why = f"cannot be read ({type(e).__name__}); what it adds to {group} is ignored"
            warnings.warn(f"the entry points of {dist.name or '?'} {why}", AdaptKitWarning, stacklevel=2)
        return []


def _text(dist: Distribution) -> str:
    try:
        return dist.read_text("entry_points.txt") or ""
    except Exception:
        return ""


def _unknown(kind: str, name: str) -> str:
    near = difflib.get_close_matches(name, names(kind), 1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"no {KINDS[kind]} named {quoted(name)!r}. {guess}Installed: {', '.join(names(kind))}"
