"""System calls that writing needs, each with the loop, the fallback or the words it lacks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import os
import shutil
import stat
from pathlib import Path

from adaptkit.errors import System

WORDS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this file system or for ulimit -f",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write here",
    errno.EPERM: "no permission to write here",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EIO: "the disk reports an input/output error",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files in the whole system",
}
HINTS = {
    errno.EFBIG: "use a smaller --max-shard-size",
    errno.EROFS: "choose another output folder",
    errno.EACCES: "choose another output folder",
    errno.EPERM: "choose another output folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "do not trust this disk; choose another output folder",
}
DIRECT = getattr(os, "O_DIRECT", 0)
EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
AT_FDCWD = -100
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def why(error: OSError) -> str:
    """What an OSError means, in plain words."""
    return WORDS.get(error.errno, error.strerror or str(error))


def write_all(fd: int, buffer, offset: int) -> None:
    """Write a whole buffer at an offset: goes on after short writes, and without O_DIRECT where that is refused."""
    with memoryview(buffer) as whole:  # released on the way out, so that a failed write does not pin the buffer
        if not whole.nbytes:
            return
        with whole.cast("B") as view:
            done = 0
            while done < len(view):
                done += _write(fd, view[done:], offset + done)


def _write(fd: int, view: memoryview, offset: int) -> int:
    try:
        return os.pwrite(fd, view, offset)
    except OSError as error:
        if error.errno == errno.EINVAL and fd_is_direct(fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~DIRECT)
            return 0
        raise System(why(error), hint=HINTS.get(error.errno)) from error
    finally:
        view.release()


def fd_is_direct(fd: int) -> bool:
    """True when writes through this descriptor bypass the page cache and so must be aligned."""
    return bool(DIRECT and fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT)


def create(path: Path, *, direct: bool = False) -> int:
    """A new file, mode 0666 & ~umask, with O_DIRECT when asked for and possible."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if direct and DIRECT:
        try:
            return os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems create it before they refuse the flag
    return os.open(path, flags, 0o666)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> list[Path]:
    """Create a folder and its missing parents so that they survive a power cut; returns those it made, from the outside in."""
    missing = [p for p in (path, *path.parents) if not p.is_dir()][::-1]
    made = []
    for folder in missing:
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue  # another run was quicker
        made.append(folder)
        sync_folder(folder.parent)
    return made


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one))


def delete(path: Path) -> None:
    """Delete a file, a link or a whole folder. Raises OSError when it is not there: then somebody else is at work."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def room(path: Path) -> tuple[float, float]:
    """Free bytes and free inodes where a path is or will be; infinite where the file system does not count them."""
    there = os.statvfs(nearest(path))
    free = there.f_bavail * there.f_frsize if there.f_blocks else float("inf")
    return free, there.f_favail if there.f_files else float("inf")


def nearest(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def size_of(path: Path) -> int | None:
    """The size of a regular file, None for anything else."""
    try:
        facts = os.lstat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def human(count: float) -> str:
    """A number of bytes as people read it: 14.5 GB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log(count, 1000)), 4)
    return f"{count / 1000**power:.1f} {UNITS[power]}"
