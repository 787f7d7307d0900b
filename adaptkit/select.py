"""Select: which modules, by regular expression or names, layer index, layers pattern and exclusion. Over names only.

The rules are those of PEFT's target_modules, exclude_modules, layers_to_transform and layers_pattern, except that a
regular expression and layer numbers may be given together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .errors import Corrupt, Mismatch, Usage, quoted

# the first number with a parent and a grandparent is the layer; a later one may be an expert ("layers.3.experts.7.w1")
LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."
SECONDS = 1.0  # what one pattern may cost on one list of names; patterns come from files, and some never end


@dataclass(frozen=True)
class Select:
    """A choice of module names.

    pattern: a regular expression that matches the whole name.    names: or, endings of names at a dot.
    layers: only modules whose layer index is one of these.       layers_pattern: what stands before that index.
    exclude: a regular expression, or endings, of names to leave out.
    """

    pattern: str | None = None
    names: Collection[str] | None = None
    layers: Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    exclude: str | Collection[str] | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.names is None):
            raise Usage("a selection needs either a regular expression or names")

    def __call__(self, names: Iterable[str]) -> list[str]:
        """The names chosen, in their order. Raises Mismatch, with the endings it saw, when there are none."""
        names = list(names)
        if hits := self.hits(names):
            return hits
        endings = sorted({n.rpartition(".")[2] for n in names} - {""})
        what = self.pattern if self.pattern is not None else ", ".join(sorted(self.names))
        where = f" in layers {_ranges(self.layers)}" if self.layers is not None else ""
        shown = ", ".join(endings[:20]) + (", ..." if len(endings) > 20 else "")
        raise Mismatch(f"no module matches {quoted(what)!r}{where}. Module names here end in: {shown}")

    def hits(self, names: Iterable[str]) -> list[str]:
        """The names chosen, possibly none."""
        names = list(names)
        wanted = matching(self.pattern if self.pattern is not None else self.names, names)
        excluded = matching(self.exclude, names) if self.exclude else set()
        # an entry that is a whole name is meant whatever its layer is, as in PEFT
        exact = set(self.names or ()) if self.pattern is None else set()
        return [n for n in names if n in wanted and n not in excluded and (n in exact or self._in_layers(n))]

    def _in_layers(self, name: str) -> bool:
        if self.layers is None or len(self.layers) == 0:
            return True
        index = layer(name, self.layers_pattern)
        return index is not None and index in self.layers


def matching(rule: str | Collection[str], names: Collection[str]) -> set[str]:
    """The names that a rule hits: a string is a regular expression for the whole name, a collection holds endings."""
    if isinstance(rule, str):
        return fullmatches(rule, names)
    endings = {e for e in rule if e}
    last = {e.rpartition(".")[2] for e in endings}  # most names end otherwise, and there may be many
    return {n for n in names if n.rpartition(".")[2] in last and any(tail in endings for tail in _tails(n))}


def unused(endings: Iterable[str], names: Iterable[str]) -> list[str]:
    """The endings that no name has."""
    there = {tail for name in names for tail in _tails(name)}
    return sorted(e for e in endings if e not in there)


def fullmatches(pattern: str, names: Collection[str]) -> set[str]:
    """The names a regular expression matches whole, within SECONDS. The pattern may come from a stranger's file."""
    import regex  # `re` has no time limit

    try:
        compiled = regex.compile(pattern, regex.VERSION0)
    except (regex.error, RecursionError) as e:
        raise Corrupt(f"{quoted(pattern)!r} is not a regular expression ({e})") from None
    try:
        return {n for n in names if compiled.fullmatch(n, timeout=SECONDS)}
    except TimeoutError:
        raise Mismatch(f"the pattern {quoted(pattern)!r} takes more than {SECONDS:g} s on one name") from None


def layer(name: str, layers_pattern: str | Collection[str] | None = None) -> int | None:
    """The layer index in a module name, None when it has none: layer("model.layers.3.mlp") -> 3."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    if not patterns:
        found = re.match(LAYER, name + ".")
        return int(found["layer"]) if found else None
    for pattern in patterns:
        if fullmatches(rf"(?:^|.*?\.)(?:{pattern})\.\d+\..*", [name + "."]):
            return int(re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name + ".")[1])
    return None


def parse_layers(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise Usage(
                f"{quoted(part)!r} is not a layer or a range of layers", where="--layers", hint="write it as 0-3,7"
            )
        if int(last or first) > 100_000:
            raise Usage(f"{quoted(part)!r} is past any model's last layer", where="--layers")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def _tails(name: str) -> Iterable[str]:
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _ranges(layers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
