"""Where output may go: a new or empty folder, away from every input, with enough room. Nothing is created here."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from adaptkit.errors import System, Usage
from adaptkit.store.disk import human, nearest, room

ENDING = ".partial"
LONGEST = 255
MARGIN = 1.02


def partial_of(path: Path) -> Path:
    """The folder in which the output at `path` is built."""
    return path.with_name(path.name + ENDING)


def checked(path: Path, inputs: Collection[Path], overwrite: bool) -> Path:
    """The absolute path output will get, or Usage that says why it cannot."""
    _check_name(path)
    if path.is_symlink():
        if not path.exists():
            raise Usage("is a symlink to nowhere", where=path, hint="delete it or choose another output")
        target = path.resolve()
    else:
        target = Path(os.path.abspath(path))
    _check_apart(path, target, inputs)
    _check_free(path, target, overwrite)
    _check_parent(path, target)
    return target


def _check_name(path: Path) -> None:
    if "\0" in str(path):
        raise Usage("the name has a NUL character", where=path)
    name = Path(os.path.abspath(path)).name
    if not name:
        raise Usage("is the root of the file system", where=path, hint="name a folder inside it")
    if name.endswith(ENDING):
        raise Usage(f"names that end in {ENDING} are for unfinished output", where=path, hint="choose another name")
    longest = max(len(os.fsencode(part)) for part in (name + ENDING, *path.parts))
    if longest > LONGEST:
        raise Usage(f"the name is too long ({longest} bytes with {ENDING}, at most {LONGEST})", where=path)


def _check_apart(path: Path, target: Path, inputs: Collection[Path]) -> None:
    """Refuse an output that is an input, lies in one, or has one inside; by inode, so that no spelling hides it."""
    ours = _inodes(target)
    building = _inodes(partial_of(target))
    for given in inputs:
        if not os.path.exists(given):
            continue
        theirs = _inodes(Path(given).resolve())
        if ours[:1] == theirs[:1] and target.exists():
            raise Usage("is also an input", where=path, hint="choose another output")
        if theirs[0] in ours:
            raise Usage(f"lies inside the input {given}", where=path, hint="choose another output")
        if target.exists() and ours[0] in theirs:
            raise Usage(f"the input {given} lies inside it", where=path, hint="choose another output")
        if partial_of(target).exists() and building[0] in theirs:
            raise Usage(f"the input {given} lies in {partial_of(target)}", where=path, hint="choose another output")


def _inodes(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path, if it exists, and of each of its parents that do, innermost first."""
    found = (p.stat() for p in (path, *path.parents) if p.exists())
    return [(facts.st_dev, facts.st_ino) for facts in found]


def _check_free(path: Path, target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise Usage("is a file", where=path, hint="choose another output")
    if os.path.ismount(target):
        raise Usage("is a mount point, which output cannot replace", where=path, hint="name a folder inside it")
    if overwrite:
        _check_dispensable(path, target)
    elif any(target.iterdir()):
        raise Usage("is not empty", where=path, hint="choose another output or use --overwrite")


def _check_dispensable(path: Path, target: Path) -> None:
    """--overwrite deletes the whole folder: never the one the user works or lives in."""
    lost = os.stat(target)
    for place, words in ((Path.cwd(), "current folder"), (Path(os.path.expanduser("~")), "home folder")):
        if (lost.st_dev, lost.st_ino) in _inodes(place.resolve()):
            raise Usage(f"--overwrite would delete your {words}", where=path, hint="choose another output")


def _check_parent(path: Path, target: Path) -> None:
    """Refuse a parent that is a file, on a read-only file system, or not ours to write."""
    parent = nearest(target.parent)
    if not parent.is_dir():
        raise Usage(f"{parent} is a file, not a folder", where=path, hint="choose another output")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise System("the file system is read-only", where=path, hint="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise System(f"no permission to write in {parent}", where=path, hint="choose another output folder")


def check_room(path: Path, target: Path, need: int, files: int) -> None:
    """Refuse to begin what the file system has no room for."""
    free, inodes = room(target.parent)
    if need * MARGIN > free:
        raise System(f"needs {human(need * MARGIN)}, {human(free)} free; nothing was written", where=path)
    if files > inodes:
        raise System(f"needs {files} inodes, {inodes} free; nothing was written", where=path)
