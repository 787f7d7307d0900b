"""Output is absent or complete, whatever call fails or kills the run; and the same command goes on from there.

Run as a script this file is the toy program that the tests kill:  test_output.py SCENARIO FOLDER
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptkit.errors import AdaptKitError, AdaptKitWarning, Corrupt, Hub, System, Unsafe, Usage
from adaptkit.store import disk, journal
from adaptkit.store.output import MANIFEST, Output, fd_is_direct, inside, open_regular, write_all

SIZES = {"model-1.bin": 5000, "empty.bin": 0, "1_Pooling/weights.bin": 9000}
PAGE = 4096


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZES[name])


def toy_output(folder: Path, **options) -> Output:
    return Output(folder / "out", **{"plan": "p1", "need": 15_000, "inputs": [folder / "in"], "files": 4, **options})


def toy_job(folder: Path, **options) -> int:
    """Write three files and a copy as an engine would; returns how many were done before."""
    with toy_output(folder, **options) as out:
        for name, size in SIZES.items():
            if not out.done(name):
                with out.file(name, size, direct=True) as fd:
                    write_aligned(fd, content(name))
        out.copy(folder / "in" / "config.json", "config.json")
        out.publish({"adaptkit": 1})
        return out.resumed


def write_aligned(fd: int, data: bytes) -> None:
    """Whole pages from page-aligned memory, then cut to size: what O_DIRECT needs."""
    pages = -(-len(data) // PAGE) * PAGE
    if pages:
        memory = mmap.mmap(-1, pages)
        memory[: len(data)] = data
        write_all(fd, memory, 0)
    os.ftruncate(fd, len(data))


def write_one(out: Output, name: str) -> None:
    with out.file(name, 1) as fd:
        write_all(fd, b"x", 0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_input(folder: Path) -> None:
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "config.json").write_text('{"model_type": "toy"}')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_input(tmp_path)
    return tmp_path


# -- the toy program: every file-changing call of a run is counted, and the k-th one goes wrong


CHANGING = ("open", "mkdir", "rmdir", "unlink", "rename", "pwrite", "fsync", "ftruncate")


class Faults:
    """Wraps the calls of the os module, and renameat2 of libc, so that call number `at` meets `fault`."""

    def __init__(self, fault, at: int, sticky: bool = False):
        self.fault, self.at, self.sticky, self.count, self.log = fault, at, sticky, 0, []

    def install(self) -> Faults:
        for name in CHANGING:
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        libc = ctypes.CDLL

        def loaded(*args, **options):
            library = libc(*args, **options)
            library.renameat2 = self.wrapped("renameat2", library.renameat2)
            return library

        ctypes.CDLL = loaded
        return self

    def wrapped(self, name: str, call):
        def faulty(*args, **options):
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **options)
            self.count += 1
            self.log.append((name, named(args[0]), args[1] if name == "rename" else None))
            if self.count == self.at or self.sticky and self.count > self.at:
                self.fault(name, call, args)
            return call(*args, **options)

        return faulty


def named(argument: object) -> object:
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) and argument > 2 else argument


def killed(name: str, call, args: tuple) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn(name: str, call, args: tuple) -> None:
    """Half of a write reaches the disk before the end."""
    if name == "pwrite":
        half = bytes(args[1])[: len(args[1]) // 2]
        with suppress(OSError):  # O_DIRECT refuses half a page
            call(args[0], half, args[2])
    killed(name, call, args)


def interrupted(name: str, call, args: tuple) -> None:
    raise KeyboardInterrupt


def failing(code: int):
    def fail(name: str, call, args: tuple) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def in_child(action) -> int:
    """Run in a forked child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        os._exit(exit_code(action))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def exit_code(action) -> int:
    try:
        action()
    except AdaptKitError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def journaled(folder: Path) -> int:
    """Files that an unfinished run may count on."""
    if not (folder / "out.partial").is_dir():
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return len(toy_output(folder, overwrite=True)._finished())


def old_output(plan: str) -> dict[str, bytes]:
    """What --overwrite replaces: other bytes under the same names and sizes, with a manifest that lists them."""
    files = {name: b"o" * size for name, size in SIZES.items()}
    manifest = {"plan": plan, "files": [{"name": name, "size": size} for name, size in SIZES.items()]}
    return {**files, MANIFEST: json.dumps(manifest).encode()}


class Enumeration:
    """The toy job, once for every call that changes a file, with a fault at that call; then again without one."""

    def __init__(self, folder: Path, fault, *, old: str | None = None, sticky: bool = False):
        self.folder, self.fault, self.old, self.sticky = folder, fault, old, sticky
        self.options = {"overwrite": bool(old)}
        self.violations: list[str] = []
        self.resumed: list[int] = []
        self.codes: set[int] = set()
        self.before = old_output(old) if old else None
        self.wanted = self.undisturbed()

    def fresh(self, name: str) -> Path:
        place = self.folder / name
        make_input(place)
        for file, data in (self.before or {}).items():
            (place / "out" / file).parent.mkdir(parents=True, exist_ok=True)
            (place / "out" / file).write_bytes(data)
        return place

    def undisturbed(self) -> dict[str, bytes]:
        place = self.fresh("undisturbed")
        assert in_child(lambda: toy_job(place, **self.options)) == 0
        return tree(place / "out")

    def run(self, at: int) -> bool:
        """False when the run was over before call number `at`."""
        place = self.fresh(str(at))
        code = in_child(lambda: self.disturbed(place, at))
        self.codes.add(code)
        self.check(at, place, code)
        self.again(at, place)
        shutil.rmtree(place)
        return (self.folder / "reached").exists() and not (self.folder / "reached").unlink()

    def disturbed(self, place: Path, at: int) -> None:
        def fault(*call) -> None:
            os.close(real_open(self.folder / "reached", os.O_CREAT | os.O_WRONLY))
            self.fault(*call)

        real_open = os.open
        Faults(fault, at, self.sticky).install()
        toy_job(place, **self.options)

    def check(self, at: int, place: Path, code: int) -> None:
        here = tree(place / "out") if (place / "out").exists() else None
        if here not in (self.wanted, self.before) and not (here is None and self.whole_aside(place)):
            self.violations.append(f"call {at}: out is neither absent, old nor complete")
        if code == 0 and here != self.wanted:
            self.violations.append(f"call {at}: success was reported for an output that is not there")
        if code not in (0, 6, 130, -signal.SIGKILL):
            self.violations.append(f"call {at}: exit code {code}")
        if tree(place / "in") != {"config.json": b'{"model_type": "toy"}'}:
            self.violations.append(f"call {at}: the input was changed")

    def whole_aside(self, place: Path) -> bool:
        """Without renameat2 there is an instant at which the old folder has another name; it must be whole."""
        return bool(self.old) and tree(place / "out.partial.old") == self.before

    def again(self, at: int, place: Path) -> None:
        if self.old or not (place / "out").exists():
            self.resumed.append(journaled(place))
            if (code := in_child(lambda: toy_job(place, **self.options))) != 0:
                self.violations.append(f"call {at}: the run after it ends with {code}")
        if tree(place / "out") != self.wanted:
            self.violations.append(f"call {at}: the run after it makes other bytes")
        if extra := {p.name for p in place.iterdir()} - {"in", "out"}:
            self.violations.append(f"call {at}: left behind {extra}")

    def report(self) -> dict:
        at = 1
        while self.run(at):
            at += 1
        return {"calls": at - 1, "violations": self.violations, "resumed": self.resumed, "codes": sorted(self.codes)}


def no_renameat2() -> None:
    """A system whose C library cannot swap two folders."""

    class Library:
        def __init__(self, *args, **options):
            pass

    ctypes.CDLL = Library


def many_at_once(folder: Path) -> list[int]:
    """The exit codes of eight runs into one output, started together."""
    gate, start = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(start)
            os.read(gate, 1)  # returns when the parent closes its end
            os._exit(exit_code(lambda: toy_job(folder)))
        children.append(pid)
    os.close(start)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def killed_again_and_again(folder: Path) -> list[int]:
    """Exit codes of the same command, killed at its 30th call each time, until it gets through."""
    codes = [-signal.SIGKILL]
    while codes[-1] and len(codes) < 20:
        codes.append(in_child(lambda: (Faults(killed, 30).install(), toy_job(folder))))
    return codes[1:]


def main(scenario: str, folder: Path) -> object:
    if scenario in JOBS:
        return sys.exit(exit_code(lambda: print("resumed", toy_job(folder, **JOBS[scenario]))))
    if scenario == "race":
        return many_at_once(folder)
    if scenario == "chain":
        return killed_again_and_again(folder)
    fault, *more = scenario.split("-")
    if "aside" in more:
        no_renameat2()
    faults = {
        "kill": killed,
        "torn": torn,
        "interrupt": interrupted,
        "EIO": failing(errno.EIO),
        "ENOSPC": failing(errno.ENOSPC),
    }
    old = "p1" if "same" in more else "p0" if "old" in more else None
    return Enumeration(folder, faults[fault], old=old, sticky="sticky" in more).report()


JOBS = {"job": {}, "job-overwrite": {"overwrite": True}, "job-blind": {"need": 1}}
ENV = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def toy(*command: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run this file as the toy program."""
    return subprocess.run([*before, sys.executable, __file__, *command], capture_output=True, text=True, env=ENV)


def answer(scenario: str, folder: Path) -> object:
    done = toy(scenario, str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("wanted")
    make_input(place)
    toy_job(place)
    return tree(place / "out")


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A folder in memory, where fsync costs nothing, if there is one."""
    home = Path("/dev/shm")
    if not os.access(home, os.W_OK) or not home.is_dir():
        yield tmp_path
        return
    place = Path(tempfile.mkdtemp(dir=home))
    yield place
    shutil.rmtree(place)


# -- every call


FAULTS = ["torn", "interrupt", "EIO", "kill-old", "kill-old-same", "kill-old-aside", "ENOSPC-old-sticky"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_leaves_the_output_absent_or_whole(memory, fault):
    """One run for each file-changing call; afterwards the same command makes the very same bytes, and nothing else."""
    report = answer(fault, memory)
    assert report["violations"] == []
    assert report["calls"] > 50


def test_work_that_is_done_is_never_done_again(memory):
    """The later a run is killed, the more files the next one finds finished; at the end all four."""
    report = answer("kill", memory)
    resumed = report["resumed"]
    assert report["violations"] == []
    assert resumed == sorted(resumed)
    assert set(resumed) == {0, 1, 2, 3, 4}


def test_a_run_that_is_killed_again_and_again_gets_through(memory, wanted):
    """Killed at its 30th call each time, the job still finishes after a few runs."""
    make_input(memory)
    codes = answer("chain", memory)
    assert codes[-1] == 0
    assert 2 <= len(codes) <= 4
    assert tree(memory / "out") == wanted


def test_of_many_runs_at_once_one_wins(memory, wanted):
    """Eight runs into one output: at least one succeeds, the rest say why not, the output is whole."""
    make_input(memory)
    codes = answer("race", memory)
    assert 0 in codes
    assert set(codes) <= {0, Usage.code, System.code}
    assert codes.count(0) == 1
    assert tree(memory / "out") == wanted
    assert {p.name for p in memory.iterdir()} == {"in", "out"}


def test_bytes_are_synced_before_the_names_that_lead_to_them(place):
    """The order that survives a power cut: file, name, folder, journal; then manifest, folder, last rename, parent."""
    log = place / "log"
    assert in_child(lambda: logged_job(place, log)) == 0
    calls = [tuple(line) for line in json.loads(log.read_text())]
    part = str(place / "out.partial")
    chain = []
    for name in (*SIZES, "config.json"):
        folder, base = os.path.split(f"{part}/{name}")
        tmp = f"{folder}/.{base}.tmp"
        chain += [("fsync", tmp, None), ("rename", tmp, f"{part}/{name}"), ("fsync", folder, None)]
        chain += [("fsync", f"{part}/{journal.NAME}", None)]
    tmp = f"{part}/.{MANIFEST}.tmp"
    chain += [("fsync", tmp, None), ("rename", tmp, f"{part}/{MANIFEST}"), ("fsync", part, None)]
    chain += [("rename", part, str(place / "out")), ("fsync", str(place), None)]
    rest = iter(calls)
    assert [step for step in chain if step not in rest] == []
    assert calls[-1] == chain[-1]


def logged_job(place: Path, log: Path) -> None:
    faults = Faults(killed, -1).install()
    toy_job(place)
    log.write_text(json.dumps([[name, str(one), two and str(two)] for name, one, two in faults.log]))


# -- single faults


def test_short_writes_are_gone_on_with(place, wanted, monkeypatch):
    """A system that writes at most 700 bytes at a time changes nothing, not even with O_DIRECT."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:700], at))
    toy_job(place)
    assert tree(place / "out") == wanted


def test_after_a_failed_fsync_nothing_more_is_written(place, monkeypatch):
    """A second fsync would succeed although the bytes are lost, so the run cannot go on, and nothing is published."""
    out = toy_output(place).__enter__()
    monkeypatch.setattr(os, "fsync", lambda fd: failing(errno.EIO)("fsync", None, ()))
    with pytest.raises(System, match="input/output error"):
        write_one(out, "a")
    monkeypatch.undo()
    with pytest.raises(System, match="has failed before"), out.file("b", 1):
        pytest.fail("a file was opened")
    with pytest.raises(System, match="nothing is published"):
        out.publish({})
    out.__exit__(None, None, None)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk full after 0 of 4 files; free 1"),
        (errno.EDQUOT, "quota is used up after 0 of 4 files"),
        (errno.EFBIG, "a: the file is too large .* --max-shard-size"),
        (errno.EROFS, "a: the file system is read-only"),
        (errno.EACCES, "a: no permission to write here"),
        (errno.EIO, "a: the disk reports an input/output error"),
        (errno.EBADF, "a: Bad file descriptor"),
    ],
)
def test_a_failed_write_says_what_happened_to_which_file(place, monkeypatch, code, words):
    """write_all knows no names; the block it is called in adds them. The system's errors become sentences."""
    with toy_output(place) as out:
        out.need = 10**16  # more than any disk has, as if the space had gone away since the start
        monkeypatch.setattr(os, "pwrite", failing(code))
        with pytest.raises(System, match=words):
            write_one(out, "a")
        monkeypatch.undo()
    assert {p.name for p in place.iterdir()} == {"in"}


def test_an_error_of_the_callers_own_file_is_passed_on(place):
    """Only what happens to the output is explained as the output's."""
    with toy_output(place) as out, pytest.raises(FileNotFoundError), out.file("a", 1):
        (place / "in" / "nothing").read_bytes()
    assert not (place / "out.partial").exists()


def test_a_buffer_is_free_after_a_failed_write(place):
    """No memoryview in the traceback keeps a mapped buffer from being closed."""
    memory = mmap.mmap(-1, PAGE)
    with pytest.raises(System) as caught:
        write_all(os.open(place, os.O_RDONLY), memory, 0)
    memory.close()
    assert caught.value.code == 6


def test_a_file_of_the_wrong_size_is_not_finished(place):
    """What was promised is compared with what is there before the journal says so."""
    with toy_output(place) as out:
        with pytest.raises(System, match="has 2 bytes after writing, 3 were expected"), out.file("a", 3) as fd:
            write_all(fd, b"ab", 0)
        assert out.done("a") is None
        assert tree(out.partial).keys() == {journal.NAME, ".lock"}


def test_a_file_that_vanishes_before_the_end_stops_the_publication(place):
    """A folder that lacks a finished file never gets its final name."""
    with toy_output(place) as out:
        write_one(out, "a")
        write_one(out, "b")
        (out.partial / "a").unlink()
        with pytest.raises(System, match="deleted or changed by another program"):
            out.publish({})
    assert not (place / "out").exists()


def test_the_limit_on_file_sizes_is_explained(place):
    """RLIMIT_FSIZE below the file: exit code 6 and words, no output, no dump."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        toy_job(place)

    assert in_child(limited) == 6
    assert {p.name for p in place.iterdir()} == {"in"}


# -- other file systems, in a mount namespace of their own


def in_mount(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a shell script with private mounts: $DIR is the folder, $TOY the toy program."""
    for unshare in (["unshare", "-m"], ["unshare", "-r", "-m"]):
        if shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no mount namespaces here")
    env = {**ENV, "DIR": str(folder), "TOY": f"{sys.executable} {__file__}"}
    done = subprocess.run([*unshare, "sh", "-ec", script], capture_output=True, text=True, env=env)
    if "mount:" in done.stderr:
        pytest.skip("mounting is not permitted here")
    return done


FILL = "mkdir $DIR/in; echo {} > $DIR/in/config.json; "


def test_too_little_room_is_found_before_the_first_byte(place):
    """The message names the bytes needed and free; nothing is created."""
    script = f"mount -t tmpfs -o size=12k none $DIR; {FILL} $TOY job $DIR || echo code $?; ls $DIR"
    done = in_mount(script, place)
    assert "needs 15.3 kB, 8.2 kB free; nothing was written" in done.stderr
    assert done.stdout.split() == ["code", "6", "in"]


def test_too_few_inodes_are_found_before_the_first_byte(place):
    """Small files fill a file system without filling its bytes."""
    done = in_mount(f"mount -t tmpfs -o nr_inodes=6 none $DIR; {FILL} $TOY job $DIR || echo code $?; ls $DIR", place)
    assert "inodes" in done.stderr
    assert done.stdout.split() == ["code", "6", "in"]


def test_a_full_disk_that_is_freed_lets_the_run_go_on(place):
    """The space goes away during the run: files that were finished are not written again."""
    again = "mount -o remount,size=1m none $DIR; $TOY job-blind $DIR; ls -A $DIR"
    script = f"mount -t tmpfs -o size=32k none $DIR; {FILL} $TOY job-blind $DIR || echo code $?; ls $DIR; {again}"
    done = in_mount(script, place)
    assert "disk full after 3 of 4 files; free" in done.stderr
    assert done.stdout.split() == ["code", "6", "in", "out.partial", "resumed", "3", "in", "out"]


def test_a_read_only_parent_is_refused_at_once(place):
    """Root may write anywhere except where the mount forbids it."""
    done = in_mount("mount --bind -o ro $DIR $DIR; mount -o remount,bind,ro $DIR; $TOY job $DIR || echo code $?", place)
    assert "read-only" in done.stderr
    assert done.stdout.split() == ["code", "6"]


def test_a_mount_point_is_refused(place):
    """An empty folder may be replaced, but not one that something is mounted on."""
    done = in_mount("mkdir $DIR/out; mount -t tmpfs none $DIR/out; $TOY job $DIR || echo code $?", place)
    assert "mount point" in done.stderr
    assert done.stdout.split() == ["code", "2"]


# -- faults from outside the process


def strace(inject: str, *command: str) -> subprocess.CompletedProcess:
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("no strace here")
    return toy(*command, before=("strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={inject}"))


@pytest.mark.parametrize("when", [4, 11])
def test_a_failing_fsync_in_the_kernel_is_never_success(place, when):
    """Exit code 6, and no output under its final name."""
    done = strace(f"fsync:error=EIO:when={when}", "job", str(place))
    assert done.returncode == 6, done.stderr
    assert not (place / "out").exists()


def test_a_failing_last_rename_loses_nothing(place, wanted):
    """Everything is written and the name cannot be given: the next run finds all files finished."""
    done = strace("/^rename(at2?)?$:error=EXDEV:when=7+", "job", str(place))
    assert done.returncode == 6, done.stderr
    assert not (place / "out").exists()
    assert toy_job(place) == 4
    assert tree(place / "out") == wanted


def test_the_old_output_survives_a_failing_swap(place):
    """--overwrite where the swap is refused: the old folder is as it was."""
    (place / "out").mkdir()
    (place / "out" / "old.bin").write_bytes(b"old")
    done = strace("renameat2:error=EACCES", "job-overwrite", str(place))
    assert done.returncode == 6, done.stderr
    assert tree(place / "out") == {"old.bin": b"old"}


def test_a_kernel_that_cannot_swap_is_worked_around(place, wanted):
    """ENOSYS from renameat2: the old folder steps aside, and is deleted when the new one is in place."""
    (place / "out").mkdir()
    (place / "out" / "old.bin").write_bytes(b"old")
    done = strace("renameat2:error=ENOSYS", "job-overwrite", str(place))
    assert done.returncode == 0, done.stderr
    assert tree(place / "out") == wanted
    assert {p.name for p in place.iterdir()} == {"in", "out"}


# -- what an earlier run left


def interrupted_job(place: Path, **options) -> None:
    """Finish one file, begin another, then stop as Ctrl-C does."""
    with suppress(KeyboardInterrupt), toy_output(place, **options) as out:
        with out.file("model-1.bin", 5000, note="first") as fd:
            write_all(fd, content("model-1.bin"), 0)
        with out.file("1_Pooling/weights.bin", 9000) as fd:
            write_all(fd, b"half", 0)
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_is_finished(place, wanted):
    """OUT.partial stays, without the file that was being written; the next run starts from it."""
    interrupted_job(place)
    assert tree(place / "out.partial").keys() == {".lock", journal.NAME, "model-1.bin"}
    with toy_output(place) as out:
        assert out.done("./model-1.bin") == {"name": "model-1.bin", "size": 5000, "note": "first"}
        assert out.done("1_Pooling/weights.bin") is None
    assert toy_job(place) == 1
    assert tree(place / "out").keys() == wanted.keys()


@pytest.mark.parametrize(
    ("error", "kept"),
    [(Corrupt, False), (Unsafe, False), (Usage, False), (System, True), (Hub, True), (MemoryError, True)],
)
def test_only_what_the_same_command_can_cure_keeps_the_partial_folder(place, error, kept):
    """A bad input makes the finished files worthless; a full disk, the network or a bug does not."""
    interrupted_job(place)
    with pytest.raises(error), toy_output(place):
        raise error("stop")
    assert (place / "out.partial").exists() == kept


def test_a_run_that_fails_early_leaves_nothing(place):
    """Nothing finished, nothing kept, not even the parents that were made."""
    with pytest.raises(MemoryError), Output(place / "new" / "deep" / "out", plan="p", need=1):
        raise MemoryError
    assert {p.name for p in place.iterdir()} == {"in"}


def test_the_partial_folder_of_another_job_is_not_touched(place):
    """Another plan: refused with a way out; --overwrite discards it."""
    interrupted_job(place, plan="p0")
    before = tree(place / "out.partial")
    with pytest.raises(Usage, match="left by another job; delete it, or use --overwrite"):
        toy_job(place)
    assert tree(place / "out.partial") == before
    assert toy_job(place, overwrite=True) == 0


def test_a_run_that_begins_while_another_finishes_says_so(place, monkeypatch):
    """The journal is listed, and gone before it is read: no input is corrupt."""
    interrupted_job(place)
    read = journal.read

    def late(folder: Path):
        (folder / journal.NAME).unlink()
        return read(folder)

    monkeypatch.setattr(journal, "read", late)
    with pytest.raises(System, match="another run finished while this one began"):
        toy_output(place)


def test_a_folder_that_only_looks_like_ours_is_not_touched(place):
    """OUT.partial without a journal may be anything."""
    (place / "out.partial").mkdir()
    (place / "out.partial" / "thesis.tex").write_text("x")
    with pytest.raises(Usage, match="left by another job"):
        toy_job(place)
    assert (place / "out.partial" / "thesis.tex").exists()
    toy_job(place, overwrite=True)
    assert not (place / "out.partial").exists()


def test_leftovers_are_swept(place, wanted):
    """Temporary files, unknown files, folders and symlinks in OUT.partial do not reach the output."""
    interrupted_job(place)
    partial = place / "out.partial"
    (partial / ".x.tmp").write_text("x")
    (partial / "model-2.bin").write_text("never journaled")
    (partial / "deep" / "er").mkdir(parents=True)
    (partial / "link").symlink_to(place / "in")
    assert toy_job(place) == 1
    assert tree(place / "out").keys() == wanted.keys()
    assert (place / "in" / "config.json").exists()


@pytest.mark.parametrize("damage", ["shorter", "gone", "folder", "symlink"])
def test_a_finished_file_that_changed_is_written_again(place, wanted, damage):
    """The journal counts only together with the file it speaks of."""
    interrupted_job(place)
    file = place / "out.partial" / "model-1.bin"
    if damage == "shorter":
        os.truncate(file, 4999)
    else:
        file.unlink()
    if damage == "folder":
        file.mkdir()
    if damage == "symlink":
        (place / "elsewhere").write_bytes(content("model-1.bin"))
        file.symlink_to(place / "elsewhere")
    assert toy_job(place) == 0
    assert tree(place / "out") == wanted


def test_a_torn_journal_is_a_warning(place):
    """The good lines count, and the run says that something was lost."""
    interrupted_job(place)
    with open(place / "out.partial" / journal.NAME, "ab") as file:
        file.write(b"1234")
    with pytest.warns(AdaptKitWarning, match="last 4 bytes of the journal are damaged; 1 files count"):
        assert toy_job(place) == 1


# -- one run at a time


def test_a_busy_output_names_its_owner(place):
    """A second run ends at once; what the first does is not disturbed."""
    with toy_output(place) as out:
        with pytest.raises(System, match=rf"in use by pid {os.getpid()} on \S+$"):
            toy_job(place)
        with pytest.raises(System, match="in use by pid"):
            toy_job(place, plan="another")
        out.publish({})
    assert json.loads((place / "out" / MANIFEST).read_text()) == {"plan": "p1", "files": []}


def test_the_lock_of_a_dead_run_is_taken_over(place, wanted):
    """The kernel lets go of the lock with the process; the file that stays means nothing."""
    (place / "out.partial").mkdir()
    (place / "out.partial" / ".lock").write_text("1 elsewhere\n")
    toy_job(place)
    assert tree(place / "out") == wanted


def test_an_output_that_is_finished_by_another_run_is_noticed_at_the_start(place):
    """Between the checks and the lock another run may have done it all: refused before any work."""
    late = toy_output(place)
    toy_job(place)
    with pytest.raises(Usage, match="is not empty"):
        late.__enter__()
    assert {p.name for p in place.iterdir()} == {"in", "out"}


def test_an_output_that_appears_meanwhile_is_not_replaced(place):
    """Another program fills OUT during the run: refused, and the work is kept."""
    with toy_output(place) as out:
        write_one(out, "a")
        (place / "out").mkdir()
        (place / "out" / "theirs").write_text("x")
        with pytest.raises(System, match="not empty"):
            out.publish({})
    assert tree(place / "out") == {"theirs": b"x"}
    assert toy_output(place, overwrite=True)._finished().keys() == {"a"}


# -- what is written


def test_files_may_be_written_by_many_threads(place):
    """Eight threads, forty files; every one is journaled and in the manifest, which is sorted."""
    names = [f"{i:02}.bin" for i in range(40)]
    with toy_output(place) as out:
        threads = [threading.Thread(target=write_some, args=(out, names[i::8])) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        out.publish({"adaptkit": 1})
    manifest = json.loads((place / "out" / MANIFEST).read_text())
    assert [record["name"] for record in manifest["files"]] == names
    assert [record["kind"] for record in manifest["files"]] == ["toy"] * 40
    assert {name: data for name, data in tree(place / "out").items() if name != MANIFEST} == {
        name: name.encode() * 100 for name in names
    }


def write_some(out: Output, names: list[str]) -> None:
    for name in names:
        with out.file(name, 600) as fd:
            write_all(fd, name.encode() * 100, 0)
            out.record(name, kind="toy")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_have_the_mode_the_umask_asks_for(place, umask):
    """0666 & ~umask for files, 0777 & ~umask for folders."""
    assert in_child(lambda: (os.umask(umask), toy_job(place))) == 0
    for path in [place / "out", *(place / "out").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask


def test_direct_writing_is_tried_and_never_needed(place):
    """The descriptor says whether it is direct; unaligned writes work all the same."""
    with toy_output(place) as out:
        with out.file("a", 5, direct=True) as fd:
            write_all(fd, b"abcde", 0)
            assert not fd_is_direct(fd)
        with out.file("b", 5) as fd:
            write_all(fd, memoryview(b"abcde"), 0)
            assert not fd_is_direct(fd)
        out.publish({})
    assert tree(place / "out")["a"] == tree(place / "out")["b"] == b"abcde"


@pytest.mark.parametrize("name", ["../x", "/x", MANIFEST, ".lock", journal.NAME, ".x.tmp", "a/.x.tmp", "C:x", ""])
def test_names_of_output_files_stay_in_the_folder(place, name):
    """The path rule holds for what we write, and our own files cannot be overwritten."""
    with toy_output(place) as out:
        with pytest.raises((Unsafe, Usage)), out.file(name, 0):
            pytest.fail("a file was opened")
        assert out._done == {}


def test_a_copied_file_has_its_hash_in_the_manifest(place):
    """copy() reads each byte once and records the sha256; a missing source is the input's fault."""
    with toy_output(place) as out:
        out.copy(place / "in" / "config.json", "sub/config.json")
        with pytest.raises(Corrupt, match="not found"):
            out.copy(place / "in" / "nothing.json", "nothing.json")
        out.publish({})
    (record,) = json.loads((place / "out" / MANIFEST).read_text())["files"]
    assert record["sha256"] == hashlib.sha256((place / "in" / "config.json").read_bytes()).hexdigest()


# -- where output may go


def test_an_empty_folder_may_be_the_output(place, wanted):
    """mkdir OUT first, or a symlink to such a folder: both work."""
    (place / "real").mkdir()
    (place / "out").symlink_to("real")
    toy_job(place)
    assert tree(place / "real") == wanted
    assert (place / "out").is_symlink()


def refusals(place: Path) -> dict[str, tuple[Path, str]]:
    (place / "file").write_text("x")
    (place / "full" / "in").mkdir(parents=True)
    (place / "dangling").symlink_to("nowhere")
    (place / "to_input").symlink_to("in")
    return {
        "a file": (place / "file", "is a file"),
        "a full folder": (place / "full", "is not empty; .* --overwrite"),
        "a dangling symlink": (place / "dangling", "symlink to nowhere"),
        "an input": (place / "in", "is also an input"),
        "an input through a symlink": (place / "to_input", "is also an input"),
        "inside an input": (place / "in" / "a" / "b", "lies inside the input"),
        "around an input": (place, "lies inside it"),
        "a long name": (place / ("o" * 300), "name is too long"),
        "below a file": (place / "file" / "out", "is a file, not a folder"),
        "a partial folder": (place / "out.partial", "unfinished output"),
        "a NUL": (place / "a\0b", "NUL"),
    }


CASES = ["a file", "a full folder", "a dangling symlink", "an input", "an input through a symlink", "inside an input"]
CASES += ["around an input", "a long name", "below a file", "a partial folder", "a NUL"]


@pytest.mark.parametrize("case", CASES)
def test_an_output_that_cannot_be_is_refused_before_anything_is_made(place, case):
    """Usage, exit code 2, and the folder is as it was."""
    path, words = refusals(place)[case]
    before = sorted(place.rglob("*"))
    with pytest.raises(Usage, match=words):
        Output(path, plan="p", need=1, inputs=[place / "in", place / "not there"])
    assert sorted(place.rglob("*")) == before


def test_overwriting_never_hits_an_input(place):
    """--overwrite does not lift the rules about inputs, nor the one about files."""
    cases = refusals(place)
    for case in ("a file", "an input", "an input through a symlink", "around an input", "a dangling symlink"):
        path, words = cases[case]
        with pytest.raises(Usage, match=words):
            Output(path, plan="p", need=1, inputs=[place / "in"], overwrite=True)


@pytest.mark.parametrize("home", [False, True])
def test_overwriting_never_hits_where_the_user_lives(place, monkeypatch, home):
    """A slip like `-o . --overwrite` would delete everything there."""
    (place / "life" / "here").mkdir(parents=True)
    if home:
        monkeypatch.setenv("HOME", str(place / "life" / "here"))
    else:
        monkeypatch.chdir(place / "life" / "here")
    with pytest.raises(Usage, match="would delete your"):
        Output(place / "life", plan="p", need=1, overwrite=True)


@pytest.mark.parametrize("name", ["with space", "new\nline", "quote'\"", "emoji 🦙", "-o"])
def test_odd_names_of_outputs_work(place, name):
    """Any name the file system takes."""
    with Output(place / name, plan="p", need=1) as out:
        out.publish({})
    assert (place / name / MANIFEST).exists()


def test_an_input_hard_linked_to_the_old_output_survives(place):
    """Files are replaced, never opened for writing, so a second name of theirs keeps its bytes."""
    toy_job(place)
    os.link(place / "out" / "model-1.bin", place / "in" / "linked.bin")
    toy_job(place, overwrite=True)
    assert (place / "in" / "linked.bin").read_bytes() == content("model-1.bin")


# -- the journal


FACTS = [{"plan": "p1"}, {"name": "a", "size": 1}, {"name": "b/c", "size": 0, "sha": "x"}, {"name": "d", "size": 70}]
LINES = b"".join(map(journal.framed, FACTS))


@st.composite
def damaged(draw) -> bytes:
    """A journal with bytes changed, cut out or put in."""
    start = draw(st.integers(0, len(LINES)))
    end = draw(st.integers(start, len(LINES)))
    return LINES[:start] + draw(st.binary(max_size=9)) + LINES[end:]


@given(st.one_of(damaged(), st.binary(max_size=200)))
@settings(derandomize=True, max_examples=500, deadline=None)
def test_a_damaged_journal_yields_a_prefix_of_what_was_written(data):
    """Whatever the bytes are, the facts are the first ones written, or none, and never others."""
    facts, good = journal.good_prefix(data)
    assert facts == FACTS[: len(facts)]
    assert data[:good] == LINES[:good]


VALUES = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just([]) | st.sampled_from(["a", "../a", "/"])
)
RECORDS = st.fixed_dictionaries({}, optional={"name": VALUES, "size": VALUES})


@given(st.lists(VALUES | RECORDS, max_size=4))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_only_records_with_a_plain_name_and_a_size_count(facts):
    """Lines that are whole but say odd things, which only another program could have written."""
    for name, record in journal.records(facts).items():
        assert record["name"] == name
        assert type(record["size"]) is int
        assert record["size"] >= 0
        assert ".." not in name.split("/")
        assert not name.startswith("/")


@given(st.one_of(damaged(), st.binary(max_size=100)))
@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_journal_crashes_a_run_or_counts_an_unfinished_file(memory, data):
    """Files a and d are there, d too short: only a can ever count."""
    place = Path(tempfile.mkdtemp(dir=memory))
    partial = place / "out.partial"
    partial.mkdir()
    (partial / journal.NAME).write_bytes(data)
    (partial / "a").write_bytes(b"x")
    (partial / "d").write_bytes(b"y" * 69)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = Output(place / "out", plan="p1", need=1)
        with out:
            assert out._done in ({}, {"a": FACTS[1]})
            assert (partial / "a").exists() == bool(out._done)
            assert not (partial / "d").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_journal_that_is_no_file_is_an_error_not_a_hang(place, kind):
    """Opening a pipe would wait for ever."""
    (place / "out.partial").mkdir()
    path = place / "out.partial" / journal.NAME
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(Corrupt, match=f"is a {kind}, not a file"):
        toy_job(place)


# -- the path rule


GOOD = {"x": "x", "./x": "x", "a/x": "a/x", "a//./x": "a/x", "..x": "..x", "ü x": "ü x", ".hidden": ".hidden"}


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_are_accepted(tmp_path, name):
    """A name below the folder, with harmless detours removed."""
    assert inside(tmp_path, name) == tmp_path / GOOD[name]


BAD = [
    "../x",
    "a/../x",
    "..",
    ".",
    "",
    "/",
    "/etc/passwd",
    "a\\x",
    "..\\x",
    "C:x",
    "c:/x",
    "\\\\host\\x",
    "a\0b",
    "a\nb",
]
BAD += ["http://host/x", "file:x", "a/.. /x", "...", "\x1b[2Jx", "\udc80x", "x\x85"]


@pytest.mark.parametrize("name", BAD)
def test_names_with_tricks_are_unsafe(tmp_path, name):
    """Under POSIX and Windows rules alike; the message is printable."""
    with pytest.raises(Unsafe, match="unsafe path '.*'; shard names must be plain names") as caught:
        inside(tmp_path, name)
    assert str(caught.value).isprintable()


def test_a_name_that_is_not_text_is_corrupt(tmp_path):
    """null or a number in an index."""
    with pytest.raises(Corrupt, match="is NoneType, not text"):
        inside(tmp_path, None)


def test_symlinks_must_stay_in_the_folder(tmp_path):
    """A file or a folder in between: within is fine, out of it is not; the folder itself may be a symlink."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret", model / "sub" / "real"):
        file.write_text("x")
    (model / "near").symlink_to("sub/real")
    (model / "far").symlink_to("../secret")
    (model / "up").symlink_to("..")
    (tmp_path / "alias").symlink_to("model")
    assert inside(model, "near") == model / "near"
    assert inside(tmp_path / "alias", "sub/real") == tmp_path / "alias" / "sub" / "real"
    for name in ("far", "up/secret", "up/model/near/../../../secret"):
        with pytest.raises(Unsafe):
            inside(model, name)


def test_the_links_of_the_hub_cache_are_accepted(tmp_path):
    """snapshots/<revision>/<name> -> ../../blobs/<hash> of the same repo, also from a subfolder; nothing else."""
    repo, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = repo / "snapshots" / "0123"
    for folder in (snapshot / "sub", repo / "blobs" / "deep", other / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    links = {
        "x": "../../blobs/1",
        "sub/x": "../../../blobs/1",
        "other": "../../../models--c--d/blobs/1",
        "ref": "../../refs/main",
        "all": "../../blobs",
        "deep": "../../blobs/deep/1",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    assert inside(snapshot, "x") == snapshot / "x"
    assert inside(snapshot, "sub/x") == snapshot / "sub" / "x"
    assert inside(snapshot / "sub", "x") == snapshot / "sub" / "x"
    for name in ("other", "ref", "all", "deep", "all/1"):
        with pytest.raises(Unsafe):
            inside(snapshot, name)


def odd_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "device").symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pipe", "is a pipe, not a file"),
        ("folder", "is a folder, not a file"),
        ("device", "is a device, not a file"),
        ("dangling", "is a symlink to a file that is not there"),
        ("loop", "is a symlink that leads back to itself"),
        ("missing", "not found"),
        ("pipe/x", "not found"),
        ("a\0b", "not found"),
        ("x" * 300, "not found"),
    ],
)
def test_only_regular_files_are_opened(tmp_path, name, words):
    """Everything else is refused at once, in words."""
    odd_files(tmp_path)
    with pytest.raises(Corrupt, match=words):
        open_regular(tmp_path / name)


def test_a_regular_file_is_opened_and_not_inherited(tmp_path):
    """Children do not get the descriptor."""
    (tmp_path / "x").write_bytes(b"abc")
    fd = open_regular(tmp_path / "x")
    assert os.pread(fd, 9, 0) == b"abc"
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_numbers_of_bytes_read_well():
    """Units of a thousand, one decimal."""
    assert [disk.human(n) for n in (0, 999, 1000, 10**6, 14.5e9, 3e15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.0 MB",
        "14.5 GB",
        "3000.0 TB",
    ]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
