"""The path rule: which names from inside a file may be opened, and opening them without surprises."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from pathlib import Path

from adaptkit.errors import Corrupt, System, Unsafe, quoted

HINT = "shard names must be plain names in the model folder"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def plain(name: str) -> str:
    """A relative name without tricks under POSIX and Windows rules alike, "./x" as "x"; anything else is Unsafe."""
    if not isinstance(name, str):
        raise Corrupt(f"a file name is {type(name).__name__}, not text")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith("/") or any(map(_tricky, parts)):
        raise Unsafe(f"unsafe path '{quoted(name)}'", hint=HINT)
    return "/".join(parts)


def _tricky(part: str) -> bool:
    """'..' in any spelling, a backslash, a drive or URL scheme, control characters, text that is not Unicode."""
    odd = any(c in "\\:" or unicodedata.category(c) in ("Cc", "Cs") for c in part)
    return odd or not part.strip(". ")


def inside(folder: Path, name: str) -> Path:
    """Where a name from a file of this folder lies; Unsafe if that is not in the folder.

    The folder may itself be reached through a symlink. A file may be a symlink within the folder, or the link
    a Hugging Face cache makes: snapshots/<revision>/<name> -> ../../blobs/<hash>.
    """
    path = Path(folder, plain(name))
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real.is_relative_to(home) or real.parent in _blobs(home) and _real_parent(path).is_relative_to(home):
        return path
    raise Unsafe(f"unsafe path '{quoted(name)}', a symlink that leaves the folder", hint=HINT)


def _real_parent(path: Path) -> Path:
    return Path(os.path.realpath(path.parent))


def _blobs(home: Path) -> list[Path]:
    """The blobs folder of the cache repo a snapshot belongs to, if it is one."""
    return [p.parent.parent / "blobs" for p in (home, *home.parents) if p.parent.name == "snapshots"][:1]


def open_regular(path: Path) -> int:
    """Open a regular file for reading; never waits, never touches a pipe or a device."""
    try:
        _refuse_odd(os.stat(path), path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from error
    try:
        _refuse_odd(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_small(path: Path, most: int = 64 << 20) -> bytes:
    """The bytes of a regular file, no more than a file of its kind ever has."""
    with open(open_regular(path), "rb") as file:
        return file.read(most)


def _refuse_odd(facts: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(facts.st_mode):
        kind = KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise Corrupt(f"is {kind}, not a file", where=path)


def _cannot_open(path: Path, error: OSError | ValueError) -> Corrupt | System:
    code = getattr(error, "errno", None)
    if code == errno.ENOENT and os.path.islink(path):
        return Corrupt("is a symlink to a file that is not there", where=path)
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, None):
        return Corrupt("not found", where=path)
    if code == errno.ELOOP:
        return Corrupt("is a symlink that leads back to itself", where=path)
    words = "no permission to read it" if code in (errno.EACCES, errno.EPERM) else error.strerror
    return System(words, where=path)
