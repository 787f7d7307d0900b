"""AdaptKitError: a mistake we can explain, and the exit code it ends with.

One sentence, always in this order:  <where>: <what is wrong, with the numbers>; <what to do>
"""

from __future__ import annotations

import unicodedata

LONGEST = 120


class AdaptKitError(Exception):
    """What is wrong, in one sentence.

    where: the file or option it is about.      hint: what the user can do.
    """

    code = 4

    def __init__(self, message: str, *, where: object = None, hint: str | None = None):
        super().__init__(message)
        self.message, self.where, self.hint = message, where, hint

    def __str__(self) -> str:
        where = f"{quoted(self.where)}: " if self.where is not None else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{where}{self.message}{hint}"

    def at(self, where: object) -> AdaptKitError:
        """Add the place, if the code that raised did not know it."""
        self.where = where if self.where is None else self.where
        return self


class Usage(AdaptKitError):
    """The command asks for something that makes no sense."""

    code = 2


class Corrupt(AdaptKitError):
    """An input is damaged."""

    code = 3


class Mismatch(AdaptKitError):
    """Sound inputs that do not fit each other, or are not supported."""

    code = 4


class Unsafe(AdaptKitError):
    """Refused because it could run code or leave its folder."""

    code = 5


class System(AdaptKitError):
    """The file system, memory or input/output failed."""

    code = 6


class Hub(AdaptKitError):
    """The Hub or the network failed."""

    code = 7


class AdaptKitWarning(UserWarning):
    """Something the user should know about a run that goes on."""


def quoted(name: object) -> str:
    """A name that came from a file, safe to print: control and bidi characters escaped, at most LONGEST long."""
    text = str(name)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 20]}...{text[-17:]}"
    return "".join(
        c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape", "replace").decode() for c in text
    )


def some(names, limit: int = 3) -> str:
    """The first few of many names: "a, b, c and 9 more"."""
    names = list(names)
    shown = ", ".join(quoted(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
