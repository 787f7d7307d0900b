"""Output appears whole: it is built in OUT.partial, and renamed into place when every byte of it is safe on disk.

A file counts as finished only by its journal line, and that is written after the file:
    .name.tmp -> fsync -> rename -> fsync folder -> journal line -> fsync
A run killed anywhere leaves OUT absent (or as it was) and OUT.partial, from which the same command goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adaptkit.errors import AdaptKitError, AdaptKitWarning, Corrupt, Mismatch, System, Unsafe, Usage
from adaptkit.store import disk, journal
from adaptkit.store.destination import MARGIN, check_room, checked, partial_of
from adaptkit.store.disk import fd_is_direct, write_all
from adaptkit.store.journal import Journal
from adaptkit.store.safepaths import inside, open_regular, plain, read_small

__all__ = ["MANIFEST", "Output", "fd_is_direct", "inside", "open_regular", "write_all"]

LOCK = ".lock"
MANIFEST = "adaptkit.json"
PARTS = ".parts"  # files on their way here, which the same job goes on with
CONTROL = {LOCK, journal.NAME, journal.FRESH, PARTS}
BAD_INPUT = (Usage, Corrupt, Mismatch, Unsafe)  # running the same command again cannot cure these
BLOCK = 1 << 20


class Output:
    """A folder that appears whole: built in OUT.partial, renamed into place at the end.

    plan: a hash of inputs and options; only a run with the same plan goes on with a partial folder.
    need: the bytes that will be written.    files: how many files they make, for messages, if known.
    resumable: whether a later run has work saved by what is there already.

    An exception inside the `with` keeps OUT.partial if the same command run again can go on from it: interrupts,
    System, Hub, anything unforeseen. It is removed after an error of the input, and when no file is finished yet.
    """

    def __init__(
        self,
        path: Path,
        *,
        plan: str,
        need: int,
        inputs: Collection[Path] = (),
        overwrite: bool = False,
        files: int | None = None,
        resumable: bool = True,
    ):
        self.resumable = resumable
        self.path, self.plan, self.need, self.files = Path(path), plan, need, files
        self.inputs, self.overwrite = inputs, overwrite
        self._done: dict[str, dict] = {}
        self._extra: dict[str, dict] = {}
        self._mutex = threading.Lock()
        self._held: list[int] = []
        self._made: list[Path] = []
        self._journal: Journal | None = None
        self._same_job = False
        self._fatal, self._damaged, self.resumed, self.published = False, 0, 0, False
        with self._explained():
            self.target = checked(self.path, inputs, overwrite)
            self.partial = partial_of(self.target)
            self.aside = self.partial.with_name(self.partial.name + ".old")
            self._check_start()

    def _check_start(self) -> None:
        try:
            done = self._finished()
            left = self.need - sum(record["size"] for record in done.values())
            check_room(self.path, self.target, left, (self.files or 1) - len(done) + len(CONTROL) + 1)
        except (Usage, System):
            self._refuse_if_busy()  # the better explanation
            raise

    # -- what an earlier run left

    def _finished(self) -> dict[str, dict]:
        """Records of the files in OUT.partial that are finished; Usage if the folder is another job's."""
        if not os.path.lexists(self.partial):
            return {}
        if self.partial.is_symlink() or not self.partial.is_dir():
            raise Usage("is in the way", where=self.partial, hint="delete it")
        there = set(os.listdir(self.partial)) - {LOCK, journal.FRESH, PARTS}
        plan, done = self._left(there)
        self._same_job = plan == self.plan
        if self._same_job:
            return {name: r for name, r in done.items() if disk.size_of(self.partial / name) == r["size"]}
        if not there or plan == "" or self.overwrite:
            return {}
        hint = "delete it, or use --overwrite to discard it"
        raise Usage("was left by another job", where=self.partial, hint=hint)

    def _left(self, there: set[str]) -> tuple[str | None, dict[str, dict]]:
        """The plan of what is there and its records; "" if it is ours but the plan is lost, None if it is not ours."""
        if journal.NAME in there:
            try:
                plan, done, self._damaged = journal.read(self.partial)
            except Corrupt as e:
                if os.path.lexists(self.partial / journal.NAME):
                    raise
                hint = "run the same command again"
                raise System("another run finished while this one began", where=self.target, hint=hint) from e
            return plan or "", done
        if MANIFEST in there and _published(self.target)[0] != self.plan:
            return _published(self.partial)  # stopped just before the last rename; not if this is what was swapped out
        return None, {}

    def _warn_of_damage(self) -> None:
        if self._damaged:
            text = f"the last {self._damaged} bytes of the journal are damaged; {len(self._done)} files count"
            warnings.warn(f"{self.partial}: {text}", AdaptKitWarning, stacklevel=4)

    def _sweep(self) -> None:
        """Delete everything in OUT.partial that is not a finished file or a folder of one."""
        keep = {self.partial / name for name in (*self._done, LOCK, journal.NAME)}
        if self._same_job:
            keep |= {self.partial / PARTS, *(self.partial / PARTS).glob("*")}
        keep |= {parent for path in keep for parent in path.parents}
        for folder, folders, names in os.walk(self.partial):
            here = Path(folder)
            for name in {*names, *folders}:
                if here / name not in keep:
                    disk.delete(here / name)
            folders[:] = [name for name in folders if here / name in keep]

    # -- one run at a time

    def _refuse_if_busy(self) -> None:
        with suppress(OSError):
            fd = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._flock(fd)
            finally:
                os.close(fd)

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise System(f"in use by {self._owner()}", where=self.partial) from error

    def _owner(self) -> str:
        with suppress(OSError, ValueError):
            pid, host = (self.partial / LOCK).read_text()[:300].split()
            return f"pid {int(pid)} on {host}"
        return "another run"

    def _lock(self) -> None:
        """Hold OUT.partial and its .lock.

        The folder is locked as well as the file, because the file is deleted before the folder is renamed: a run that
        makes a new .lock between the two would work in a folder that moves away.
        """
        while True:
            self._made += disk.make_folders(self.partial)
            with suppress(FileNotFoundError):
                self._hold_folder(self.partial)
            if self._is_ours():
                break
            self._release()  # published or removed by another run between two of our calls
        lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._held.append(lock)
        self._flock(lock)
        if os.fstat(lock).st_size:
            text = f"{self.partial}: left by {self._owner()}, which is gone; taken over"
            warnings.warn(text, AdaptKitWarning, stacklevel=4)
        os.ftruncate(lock, 0)
        write_all(lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def _hold_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # NFS cannot lock folders; there .lock has to do
                self._flock(fd)
        except BaseException:
            os.close(fd)  # held by another run: it is not ours to work in, nor to remove
            raise
        self._held.append(fd)

    def _is_ours(self) -> bool:
        """True while the folder called OUT.partial is the one we hold."""
        try:
            return os.path.samestat(os.fstat(self._held[0]), os.lstat(self.partial))
        except (OSError, IndexError):
            return False

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    # -- the run

    def __enter__(self) -> Output:
        try:
            with self._explained():
                self._lock()
                checked(self.path, self.inputs, self.overwrite)  # another run may have finished meanwhile
                self._done = self._finished()
                self._warn_of_damage()
                self._sweep()
                self._journal = Journal(self.partial, self.plan, self._done.values())
        except BaseException:
            if self.partial in self._made and self._is_ours():
                self._remove()
            self._release()
            raise
        self.resumed = len(self._done)
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self._journal.close()
        if not self.published and self._is_ours() and self._is_useless(error):
            self._remove()
        self._release()
        # an interrupt that comes when the output has appeared has nothing left to interrupt
        return self.published and error is not None and not isinstance(error, Exception)

    def _is_useless(self, error: object) -> bool:
        """Whether what was made so far helps no later run."""
        return isinstance(error, BAD_INPUT) or not self._begun() or not self.resumable

    def _begun(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self._done) or any((self.partial / PARTS).glob("*"))

    def part(self, name: str) -> Path:
        """Where a file may grow over several runs of the same job, before it is adopted."""
        disk.make_folders(self.partial / PARTS)
        return self.partial / PARTS / name

    def adopt(self, part: Path, name: str, **extra) -> None:
        """Take a part that is complete as the file of this name. extra: facts for its record."""
        name = self._own_name(name)
        with self._explained(name):
            fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                length = self._settled(fd, name, None)
            finally:
                os.close(fd)
            disk.make_folders((self.partial / name).parent)
            os.rename(part, self.partial / name)
            disk.sync_folder((self.partial / name).parent)
            self._finish({**extra, "name": name, "size": length})

    def _remove(self) -> None:
        """Remove OUT.partial and the parents that were made for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()

    def done(self, name: str) -> dict | None:
        """The journal record of a finished file: name, size and whatever was recorded with it."""
        return self._done.get(plain(name))

    @contextmanager
    def file(self, name: str, size: int | None = None, *, direct: bool = False, **extra) -> Iterator[int]:
        """A descriptor to write one file through; the file is there when the block ends without an exception.

        size: what the file must have in the end, if known.    direct: O_DIRECT where possible, see fd_is_direct.
        extra: facts for the file's record, see record().    Thread-safe, for different names.
        """
        name = self._own_name(name)
        path = self.partial / name
        tmp = path.with_name(f".{path.name}.tmp")
        with self._explained(name, tmp):
            disk.make_folders(path.parent)
            fd = disk.create(tmp, direct=direct)
            try:
                self._extra[name] = extra
                yield fd
                length = self._settled(fd, name, size)
            finally:
                os.close(fd)
            os.rename(tmp, path)
            disk.sync_folder(path.parent)
            self._finish({**self._extra.pop(name), "name": name, "size": length})

    def _own_name(self, name: str) -> str:
        name = plain(name)
        if self._fatal:
            raise System("writing has failed before, nothing more is written", where=self.partial)
        if name in CONTROL or name == MANIFEST or Path(name).name.startswith(".") and name.endswith(".tmp"):
            raise Usage(f"the name {name} is kept for AdaptKit's own files", where=self.path)
        return name

    def _settled(self, fd: int, name: str, size: int | None) -> int:
        """The length of a file whose bytes are safe on disk."""
        length = os.fstat(fd).st_size
        if size is not None and length != size:
            raise System(f"has {length:,} bytes after writing, {size:,} were expected", where=self.partial / name)
        try:
            os.fsync(fd)
        except OSError:
            self._fatal = True  # the kernel forgets what it could not write: a second fsync would lie
            raise
        return length

    def _finish(self, record: dict) -> None:
        with self._mutex:
            self._journal.append(record)
            self._done[record["name"]] = record

    def record(self, name: str, **extra) -> None:
        """Add facts, such as a hash, to the record of a file that is being written."""
        self._extra[plain(name)].update(extra)

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file; its record gets the sha256."""
        fd = open_regular(source)
        try:
            size, at, digest = os.fstat(fd).st_size, 0, hashlib.sha256()
            with self.file(name, size) as out:
                while block := _read(fd, at, source):
                    write_all(out, block, at)
                    digest.update(block)
                    at += len(block)
                if at != size:
                    raise Corrupt("changed while it was read", where=source)
                self.record(name, sha256=digest.hexdigest())
        finally:
            os.close(fd)

    # -- the end

    def publish(self, manifest: dict) -> None:
        """Write the manifest and let the folder appear under its name.

        The manifest also gets the plan and the records of all files, if it has no "plan" and "files" of its own:
        they stand in for the journal if the run is killed between deleting that and the last rename.
        """
        self._check_complete()
        files = [self._done[name] for name in sorted(self._done)]
        text = json.dumps({"plan": self.plan, "files": files, **manifest}, indent=1) + "\n"
        tmp = self.partial / f".{MANIFEST}.tmp"
        with self._explained(MANIFEST, tmp):
            fd = disk.create(tmp)
            try:
                write_all(fd, text.encode(), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(tmp, self.partial / MANIFEST)
            disk.sync_folder(self.partial)
        with self._explained():
            self._appear()

    def _check_complete(self) -> None:
        if self._fatal:
            raise System("writing has failed before, nothing is published", where=self.partial)
        for name, record in self._done.items():
            if disk.size_of(self.partial / name) != record["size"]:
                raise System("was deleted or changed by another program", where=self.partial / name)

    def _appear(self) -> None:
        shutil.rmtree(self.partial / PARTS, ignore_errors=True)
        os.unlink(self.partial / journal.NAME)
        os.unlink(self.partial / LOCK)
        disk.sync_folder(self.partial)
        if self.overwrite and self.target.exists():
            self._swap()
        else:
            os.rename(self.partial, self.target)  # replaces an empty folder, fails if another run put files there
        self.published = True
        disk.sync_folder(self.target.parent)
        if self.overwrite and os.path.lexists(self.aside):  # from a run that was killed between its two renames
            _delete_old(self.aside)

    def _swap(self) -> None:
        """Put the new folder in the place of the old one in a single step, then delete the old one."""
        self._hold_folder(self.target)  # it will be OUT.partial for a moment: no other run may begin to work in it
        if not disk.exchange(self.partial, self.target):
            self._step_aside()
        disk.sync_folder(self.target.parent)
        if os.path.lexists(self.partial):
            _delete_old(self.partial)

    def _step_aside(self) -> None:
        """The swap where the system has none: for an instant there is no OUT, but both folders are whole."""
        if os.path.lexists(self.aside):
            disk.delete(self.aside)
        os.rename(self.target, self.aside)
        try:
            os.rename(self.partial, self.target)
        except OSError:
            os.rename(self.aside, self.target)
            raise

    # -- errors

    @contextmanager
    def _explained(self, name: str | None = None, tmp: Path | None = None) -> Iterator[None]:
        """Turn what the system reports into a sentence, after deleting the file that did not succeed."""
        try:
            yield
        except BaseException as error:
            if tmp:
                with suppress(OSError):
                    tmp.unlink()
            cause = _cause(error)
            if cause is None or name and self._of_another_file(cause):
                raise
            raise self._sentence(cause, name) from cause

    def _of_another_file(self, error: OSError) -> bool:
        """True for what the caller met in its own files while it was writing ours."""
        return error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(self.partial)

    def _sentence(self, error: OSError, name: str | None) -> System:
        place = getattr(self, "partial", self.path)
        words, hint = disk.why(error), disk.HINTS.get(error.errno)
        if words in (disk.WORDS[disk.errno.ENOSPC], disk.WORDS[disk.errno.EDQUOT]):
            return self._full(words, place)
        return System(words, where=place / name if name else error.filename or place, hint=hint)

    def _full(self, words: str, place: Path) -> System:
        total = f"{len(self._done)} of {self.files}" if self.files else f"{len(self._done)}"
        free, inodes = disk.room(place)
        left = self.need * MARGIN - sum(record["size"] for record in self._done.values()) - free
        if not inodes:
            words, left = "no inodes left (too many files)", 0
        space = disk.human(left) if left > 0 else "some space"
        hint = f"free {space} and run the same command again to go on"
        return System(f"{words} after {total} files", where=place, hint=hint)


def _cause(error: BaseException) -> OSError | None:
    """The OSError to explain: the exception itself, or what write_all met without knowing the file."""
    if isinstance(error, System) and error.where is None:
        error = error.__cause__
    return error if isinstance(error, OSError) else None


def _published(folder: Path) -> tuple[str | None, dict[str, dict]]:
    """The plan and the records in a folder's manifest."""
    with suppress(AdaptKitError, ValueError, RecursionError, AttributeError):
        manifest = json.loads(read_small(folder / MANIFEST))
        return manifest.get("plan"), journal.records(manifest.get("files"))
    return None, {}


def _read(fd: int, at: int, source: Path) -> bytes:
    try:
        return os.pread(fd, BLOCK, at)
    except OSError as error:
        raise System(f"cannot be read ({error.strerror})", where=source) from error


def _delete_old(folder: Path) -> None:
    """Delete the output that was replaced, its manifest first: without that it cannot pass for an unfinished run."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder}: the old output could not be deleted ({disk.why(error)})", AdaptKitWarning)
