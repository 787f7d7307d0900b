"""A merge on a bad system: killed, interrupted, out of room, lied to. The output is absent or complete, and the rerun goes on.

Everything goes through the real command line. Faults of the system come from signals, limits, mounts, strace, or from
faults/sitecustomize.py, which the child's Python imports by itself.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import inputs, namespaces, running
from faults.running import QUICK, Ended, ended, finished, run, start, stopped, tree, until

from adaptkit.store import journal

MANIFEST = "adaptkit.json"
PARALLEL = 3
needs_mount = pytest.mark.skipif(
    not namespaces.permitted(), reason="mounting in a namespace of our own is not permitted here"
)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@dataclass
class Model:
    """A base and an adapter, and what merging them makes.    seconds: from the first file to the end of a quiet run."""

    place: Path
    wanted: dict[str, str]
    inputs: dict[str, str]
    seconds: float


def model(place: Path, **sizes) -> Model:
    inputs.make(place, **sizes)
    before = tree(place)
    process = start(place)
    until((place / "out.partial").exists, process)
    found = ended(process)
    assert found.code == 0, found.err
    wanted = tree(place / "out")
    shutil.rmtree(place / "out")
    return Model(place, wanted, before, found.seconds)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Model:
    return model(tmp_path_factory.mktemp("small"), shards=4, hidden=64)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[Model]:
    """24 MB in 8 shards. No fault may touch the inputs."""
    made = model(tmp_path_factory.mktemp("large"))
    yield made
    assert tree(made.place) == made.inputs


def at(folder: Path, model: Model) -> Path:
    """A working folder that shows a model's inputs by symlinks: the same files, so the same plan."""
    folder.mkdir(exist_ok=True)
    for name in ("base", "lora"):
        (folder / name).symlink_to(model.place / name)
    return folder


def copied(folder: Path, model: Model) -> Path:
    """A working folder with inputs of its own that may be damaged."""
    for name in ("base", "lora"):
        shutil.copytree(model.place / name, folder / name)
    return folder


def limited(limit: str) -> list[str]:
    return ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh"]


def weights(files: dict[str, str]) -> dict[str, str]:
    """All files but the manifest, whose plan also depends on where the inputs lie and how old they are."""
    return {name: digest for name, digest in files.items() if name != MANIFEST}


def assert_failed(found: Ended, place: Path, code: int | tuple[int, ...], words: str = "") -> None:
    """One line, an expected exit code, and nothing under the final name."""
    assert found.code in (code if isinstance(code, tuple) else (code,)), found
    assert len(found.lines) == 1, found.err
    assert found.err.startswith("error: "), found.err
    assert re.search(words, found.err), found.err
    assert not os.path.lexists(place / "out")


def assert_stopped(found: Ended, place: Path, code: int) -> None:
    """What a signal may leave: its exit code at once, one line, no output."""
    assert found.code == code, found
    assert found.seconds < QUICK
    assert len(found.lines) == 1, found.err
    assert re.fullmatch(r"(interrupted|terminated).*; run the same command again to go on", found.lines[0])
    assert not os.path.lexists(place / "out")


def assert_resumes(place: Path, model: Model, *options: str, **how) -> Ended:
    """The same command again finishes, with the bytes of an undisturbed run and nothing beside them."""
    found = run(place, *options, **how)
    assert found.code == 0, found.err
    assert tree(place / "out") == model.wanted
    assert sorted(p.name for p in place.iterdir()) == ["base", "lora", "out"]
    return found


# -- killed


def test_a_killed_run_leaves_no_output_and_the_same_command_goes_on(small, tmp_path):
    """SIGKILL before the third shard gets its name: two are kept, and the rest follows."""
    place = at(tmp_path, small)
    found = run(place, faults="rename,SIGKILL,3,.safetensors.tmp")
    assert found.code == -signal.SIGKILL
    assert not (place / "out").exists()
    assert len(finished(place / "out.partial")) == 2
    assert "2 files were there already" in assert_resumes(place, small).out


def kill_at(share: float, place: Path, model: Model, sign: int, *options: str) -> Ended:
    """Send a signal when this share of the writing should be done."""
    process = start(place, *options)
    until((place / "out.partial").exists, process)
    time.sleep(share * model.seconds)
    process.send_signal(sign)
    return ended(process)


def moments(count: int, seed: int) -> list[tuple[int, float]]:
    numbers = random.Random(seed)
    return [(k, numbers.random()) for k in range(count)]


def together(job, moments: list) -> list:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(lambda moment: job(*moment), moments))


@pytest.mark.slow
def test_kills_at_fifty_moments_leave_absent_or_complete_and_resumable_output(large, tmp_path):
    """SIGKILL anywhere while files are written: OUT is never there and wrong, and the rerun ends with the same bytes."""

    def job(k: int, share: float) -> bool:
        place = at(tmp_path / str(k), large)
        code = kill_at(share, place, large, signal.SIGKILL).code
        complete = (place / "out").exists()
        if complete:
            assert tree(place / "out") == large.wanted
        else:
            assert code == -signal.SIGKILL
            assert_resumes(place, large)
        shutil.rmtree(place)
        return complete

    assert together(job, moments(50, seed=1)).count(False) >= 25


@pytest.mark.slow
def test_kills_while_overwriting_leave_the_old_or_the_new_output(large, tmp_path):
    """--overwrite at eight random moments of death: OUT is one or the other, whole, and the rerun makes it the new one."""

    def job(k: int, share: float) -> None:
        place = at(tmp_path / str(k), large)
        (place / "out").mkdir()
        (place / "out" / "old").write_text("old")
        old = tree(place / "out")
        kill_at(share, place, large, signal.SIGKILL, "--overwrite")
        assert tree(place / "out") in (old, large.wanted)
        assert_resumes(place, large, "--overwrite")

    together(job, moments(8, seed=2))


DEATHS = ["rename,SIGKILL,{},.safetensors.tmp", "pwrite,SIGKILL,{},.adaptkit.journal", "fsync,SIGKILL,{},out.partial"]
DEATHS += ["pwrite,SIGKILL,{},.safetensors.tmp", "fsync,SIGKILL,{},.safetensors.tmp"]


@pytest.mark.slow
def test_work_done_never_shrinks_when_every_resume_is_killed_too(tmp_path):
    """Twenty kills in a row at random calls: each run begins with all that the last one had finished, and it ends well."""
    many = model(tmp_path / "many", shards=60, hidden=64)
    place, numbers, done = at(tmp_path / "place", many), random.Random(3), [set()]
    for _ in range(20):
        found = run(place, faults=numbers.choice(DEATHS).format(numbers.randint(1, 4)))
        assert found.code == -signal.SIGKILL
        assert not (place / "out").exists()
        done.append(journaled(place / "out.partial"))
        assert done[-2] <= done[-1]
    assert len(done[-1]) > 10
    assert f"{len(done[-1])} files were there already" in assert_resumes(place, many).out


def journaled(partial: Path) -> set[str]:
    """Names of the files that count as finished."""
    return set(journal.read(partial)[1]) if (partial / journal.NAME).exists() else set()


# -- interrupted


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_run_with_one_line_and_what_is_done_is_kept(small, tmp_path, name, code):
    """Ctrl-C or SIGTERM in the third shard: the exit code of the signal, no traceback, no output, two shards kept."""
    place = at(tmp_path, small)
    assert_stopped(run(place, faults=f"rename,{name},3,.safetensors.tmp"), place, code)
    assert len(finished(place / "out.partial")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_at_random_moments_are_answered_at_once(large, tmp_path, sign, code):
    """Eight moments while files are written: exit within two seconds, one line, OUT absent, and the rerun goes on."""

    def job(k: int, share: float) -> bool:
        place = at(tmp_path / str(k), large)
        found = kill_at(share * 0.8, place, large, sign)
        if (place / "out").exists():  # it was quicker
            assert tree(place / "out") == large.wanted
            return False
        assert_stopped(found, place, code)
        assert_resumes(place, large)
        return True

    assert together(job, moments(8, seed=code)).count(True) >= 3


@pytest.mark.slow
def test_two_interrupts_within_a_tenth_of_a_second_are_as_good_as_one(large, tmp_path):
    """A second Ctrl-C during the answer to the first: no traceback, OUT absent or whole, and the rerun goes on."""
    numbers = random.Random(5)

    def job(k: int, share: float) -> None:
        place = at(tmp_path / str(k), large)
        process = start(place)
        until((place / "out.partial").exists, process)
        time.sleep(share * large.seconds * 0.7)
        process.send_signal(signal.SIGINT)
        time.sleep(numbers.random() * 0.1)
        process.send_signal(signal.SIGINT)
        found = ended(process)
        assert "Traceback" not in found.err, found.err
        if found.code:
            assert found.code in (130, -signal.SIGINT), found
            assert found.seconds < QUICK
            if (place / "out").exists():  # the work was done already, and the signals met the interpreter's end
                assert tree(place / "out") == large.wanted
            else:
                assert_resumes(place, large)

    together(job, moments(8, seed=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["click", "adaptkit.cli.app", "numpy", "adaptkit.verbs.merge", "adaptkit.formats.peft"]
)
def test_an_interrupt_while_modules_are_imported_shows_no_traceback(small, tmp_path, module):
    """Ctrl-C right after pressing return, in what AdaptKit imports."""
    found = run(at(tmp_path, small), faults=f"import,SIGINT,1,{module}")
    assert found.code in (130, -signal.SIGINT)
    assert "Traceback" not in found.err, found.err
    assert len(found.lines) <= 1, found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupt_after_the_output_has_appeared_does_not_ask_for_another_run(small, tmp_path):
    """Ctrl-C between the last rename and the end: the run is done, and says so, or the same command must work again."""
    place = at(tmp_path, small)
    found = run(place, faults=f"fsync,SIGINT,2,{tmp_path.name}")
    assert tree(place / "out") == small.wanted
    assert found.code == 0 or "run the same command again" not in found.err, found


@pytest.mark.slow
def test_an_interrupt_on_a_slow_disk_is_answered_within_two_seconds(tmp_path):
    """20 ms for every read, and files large enough that one thread has seconds of work in hand."""
    place = inputs.make(tmp_path, shards=1, hidden=2304)
    process = start(place, "--workers", "1", faults="preadv,slow20,1+")
    until(lambda: list((place / "out.partial").glob(".*.safetensors.tmp")), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert_stopped(ended(process), place, 130)


@pytest.mark.slow
def test_a_storm_of_signals_changes_no_byte(large, tmp_path):
    """SIGWINCH, SIGCHLD and stop-and-go a few hundred times: interrupted calls are made again."""
    place, count = at(tmp_path, large), 0
    process = start(place)
    until((place / "out.partial").exists, process)
    while process.poll() is None:
        for sign in (signal.SIGWINCH, signal.SIGCHLD, signal.SIGSTOP, signal.SIGCONT):
            process.send_signal(sign)
        count += 1
        time.sleep(0.002)
    assert ended(process).code == 0
    assert count > 10
    assert tree(place / "out") == large.wanted


# -- no room


def test_a_disk_that_fills_up_ends_the_run_and_the_rerun_goes_on(small, tmp_path):
    """ENOSPC in the third shard: exit 6 with how far it came and what to do; the finished shards are not made again."""
    place = at(tmp_path, small)
    found = run(place, faults="pwrite,ENOSPC,3,.safetensors.tmp")
    assert_failed(found, place, 6, r"disk full after 2 of 4 files; free .* and run the same command again to go on")
    kept = {name: (place / "out.partial" / name).stat().st_ino for name in finished(place / "out.partial")}
    assert len(kept) == 2
    assert_resumes(place, small)
    assert kept == {name: (place / "out" / name).stat().st_ino for name in kept}


def on_tmpfs(folder: Path, model: Model, options: str):
    """A tmpfs on a folder, with symlinks to the model."""
    folder.mkdir()
    link = f'ln -s {model.place}/base {model.place}/lora "$0"'
    return namespaces.mounted(folder, f'mount -t tmpfs -o {options} none "$0" && {link}')


@pytest.mark.slow
@needs_mount
def test_a_disk_that_is_too_small_is_found_before_anything_is_written(large, tmp_path):
    """The free space is compared with what is needed, and both numbers are said."""
    with on_tmpfs(tmp_path / "disk", large, "size=16m") as disk:
        found = run(tmp_path, before=disk.enter)
        assert_failed(found, disk.inside, 6, r"needs 24\.\d MB, 16\.\d MB free; nothing was written")
        assert not (disk.inside / "out.partial").exists()


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("shard", [1, 4, 8])
def test_a_disk_that_another_program_fills_and_frees_again(large, tmp_path, shard):
    """Space goes away while shard N is written: exit 6; when it is back, the rerun makes only what was not finished."""
    with on_tmpfs(tmp_path / "disk", large, "size=64m") as disk:
        out, filler = disk.inside / "out.partial", disk.inside / "filler"
        process = start(tmp_path, before=disk.enter, faults=f"pwrite,SIGSTOP,{shard},.safetensors.tmp")
        stopped(process)
        with open(filler, "wb") as f, suppress(OSError):
            while f.write(bytes(1 << 16)):
                f.flush()
        os.kill(process.pid, signal.SIGCONT)
        assert_failed(ended(process), disk.inside, 6, "disk full after")
        kept = {name: (out / name).stat().st_ino for name in finished(out)} if out.exists() else {}
        filler.unlink()
        assert run(tmp_path, before=disk.enter).code == 0
        assert tree(disk.inside / "out") == large.wanted
        assert kept == {name: (disk.inside / "out" / name).stat().st_ino for name in kept}


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("count", [4, 8])
def test_a_disk_without_inodes_is_named_as_such(small, tmp_path, count):
    """Every byte is free and no file can be made: exit 6, in words about inodes."""
    with on_tmpfs(tmp_path / "disk", small, f"size=64m,nr_inodes={count}") as disk:
        assert_failed(run(tmp_path, before=disk.enter), disk.inside, 6, "inodes")


@pytest.mark.slow
@needs_mount
def test_inodes_that_go_away_during_the_run_end_it(small, tmp_path):
    """Another program takes the last inode: exit 6 in words about inodes, and the rerun goes on."""
    with on_tmpfs(tmp_path / "disk", small, "size=64m,nr_inodes=40") as disk:
        process = start(tmp_path, before=disk.enter, faults="rename,SIGSTOP,2,.safetensors.tmp")
        stopped(process)
        with suppress(OSError):
            for k in range(40):
                (disk.inside / f"filler{k}").touch()
        os.kill(process.pid, signal.SIGCONT)
        assert_failed(ended(process), disk.inside, 6, "inodes")
        [path.unlink() for path in disk.inside.glob("filler*")]
        assert run(tmp_path, before=disk.enter).code == 0
        assert tree(disk.inside / "out") == small.wanted


@pytest.mark.slow
@needs_mount
def test_a_read_only_disk_is_refused_in_words(small, tmp_path):
    """Root ignores mode bits; a read-only mount holds for everybody."""
    with namespaces.mounted(
        at(tmp_path / "disk", small), 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
    ) as disk:
        assert_failed(run(tmp_path, before=disk.enter), disk.inside, 6, "the file system is read-only")


def test_a_file_size_limit_below_a_shard_is_an_error_in_words(small, tmp_path):
    """ulimit -f: exit 6 and no core dump."""
    found = run(at(tmp_path, small), before=limited("-f 20"))
    assert_failed(found, tmp_path, 6, "too large .* ulimit -f; use a smaller --max-shard-size")


# -- the system reports errors


FAILING = {
    "a header cannot be read": ("pread,EIO,1,00002-of-00004.safetensors", "model-00002-of-00004.safetensors"),
    "the base cannot be read": ("preadv,EIO,2,2-of-00004.safetensors", "2-of-00004.safetensors: cannot be read"),
    "the adapter cannot be read": (
        "preadv,EIO,1+,adapter_model.safetensors",
        "adapter_model.safetensors: cannot be read",
    ),
    "a write fails": ("pwrite,EIO,2,.safetensors.tmp", "input/output error"),
    "a journal line fails": ("pwrite,EIO,3,.adaptkit.journal", "input/output error"),
    "the manifest fails": ("pwrite,EIO,1,adaptkit.json.tmp", "input/output error"),
    "the first fsync fails": ("fsync,EIO,1", "input/output error"),
    "a shard's fsync fails": ("fsync,EIO,2,.safetensors.tmp", "input/output error"),
    "every fsync fails": ("fsync,EIO,6+", "input/output error"),
    "the folder's fsync fails": ("fsync,EIO,3,out.partial", "input/output error"),
    "a shard cannot be renamed": ("rename,EACCES,2,.safetensors.tmp", "no permission"),
    "the manifest cannot be renamed": ("rename,EIO,1,adaptkit.json.tmp", "input/output error"),
    "the output cannot be renamed": ("rename,EXDEV,1,out.partial", "out.partial: "),
    "cutting a file fails": ("ftruncate,EIO,2,.safetensors.tmp", "input/output error"),
    "the folder cannot be made": ("mkdir,EDQUOT,1,out.partial", "quota"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILING)
def test_a_call_that_fails_ends_the_run_without_output_and_the_rerun_goes_on(small, tmp_path, case):
    """Exit 6, one line that says what failed; the error is never retried into a success."""
    place, (faults, words) = at(tmp_path, small), FAILING[case]
    assert_failed(run(place, faults=faults), place, 6, words)
    assert_resumes(place, small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", ["rename,EACCES,2,.safetensors.tmp", "fsync,EIO,1,adaptkit.json.tmp", "pwrite,ENOSPC,2"]
)
def test_an_old_output_stays_when_overwriting_it_fails(small, tmp_path, faults):
    """--overwrite replaces in one step at the end, so that whatever fails before leaves the old folder as it was."""
    place = at(tmp_path, small)
    (place / "out").mkdir()
    (place / "out" / "old").write_text("old")
    old = tree(place / "out")
    assert run(place, "--overwrite", faults=faults).code == 6
    assert tree(place / "out") == old
    assert_resumes(place, small, "--overwrite")


def test_short_writes_change_no_byte(small, tmp_path):
    """The kernel may write 1000 bytes of any request; the rest is written after them."""
    assert running.merged(at(tmp_path, small), faults="pwrite,short,1+") == small.wanted


def strace(*options: str) -> list[str]:
    return ["strace", "-f", "-qq", "-o", os.devnull, *options]


INJECTED = {
    "read": (
        "preadv,pread64:error=EIO:when=2+",
        "base/model-00003-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
    ),
    "write": ("pwrite64:error=EIO:when=1", "out.partial/.model-00002-of-00004.safetensors.tmp", "input/output error"),
    "fsync": (
        "fsync,fdatasync:error=EIO:when=1",
        "out.partial/.model-00002-of-00004.safetensors.tmp",
        "input/output error",
    ),
    "rename a shard": (
        "rename,renameat2:error=EACCES:when=1",
        "out.partial/.model-00002-of-00004.safetensors.tmp",
        "permission",
    ),
    "rename the output": ("rename,renameat2:error=EXDEV:when=1", "out.partial", "out.partial"),
}


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("case", INJECTED)
def test_an_error_from_the_kernel_ends_the_run_without_output(small, tmp_path, case):
    """The same as above one floor lower: no way round the calls that Python's os module makes."""
    place, (fault, path, words) = at(tmp_path, small), INJECTED[case]
    spot = (place / path).resolve()
    found = run(place, before=strace("-P", str(spot), "-e", f"inject={fault}"))
    assert_failed(found, place, 6, words)
    assert_resumes(place, small)


@pytest.mark.slow
@needs_strace
def test_an_exchange_that_the_kernel_refuses_leaves_the_old_output(small, tmp_path):
    """renameat2 with EACCES: exit 6, OUT as it was, and the rerun replaces it."""
    place = at(tmp_path, small)
    (place / "out").mkdir()
    (place / "out" / "old").write_text("old")
    old = tree(place / "out")
    found = run(place, "--overwrite", before=strace("-e", "trace=renameat2", "-e", "inject=renameat2:error=EACCES"))
    assert found.code == 6
    assert tree(place / "out") == old
    assert_resumes(place, small, "--overwrite")


LOGGED = re.compile(r'(\w+)\((?:\d+<([^>]*)>|"([^"]*)"(?:, "([^"]*)")?)')


def logged(log: Path) -> list[tuple[str, str, str]]:
    """(call, path, second path) in the order in which the calls were finished."""
    begun, found = {}, []
    for line in log.read_text().splitlines():
        pid, text = line.split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            begun[pid] = text
            continue
        text = begun.pop(pid, "") if text.startswith("<...") else text
        if match := LOGGED.match(text):
            found.append((match[1], match[2] or match[3], match[4] or ""))
    return found


@pytest.mark.slow
@needs_strace
def test_what_is_written_survives_a_power_cut_in_every_order(small, tmp_path):
    """Each file: written < fsync < rename < fsync of the folder < journal; all of them < manifest < OUT < fsync of its parent."""
    place, log = at(tmp_path, small), tmp_path.with_suffix(".log")
    calls = "pwrite64,write,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink"
    found = run(place, before=["strace", "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={calls}"])
    assert found.code == 0, found.err
    events, partial = logged(log), str(place / "out.partial")
    manifest = events.index(("rename", f"{partial}/.{MANIFEST}.tmp", f"{partial}/{MANIFEST}"))
    for name in small.wanted:
        tmp, final = f"{partial}/.{name}.tmp", f"{partial}/{name}"
        renamed = events.index(("rename", tmp, final))
        written = [
            k for k, (call, path, _) in enumerate(events) if path == tmp and call in ("pwrite64", "write", "ftruncate")
        ]
        assert written
        assert ("fsync", tmp, "") in events[max(written) : renamed], name
        safe = events.index(("fsync", partial, ""), renamed)
        if name != MANIFEST:
            journal = events.index(("pwrite64", f"{partial}/.adaptkit.journal", ""), safe)
            assert ("fsync", f"{partial}/.adaptkit.journal", "") in events[journal:manifest], name
    appeared = events.index(("rename", partial, str(place / "out")))
    assert events.index(("fsync", partial, ""), manifest) < appeared
    assert ("fsync", str(place), "") in events[appeared:]


# -- inputs that change


def test_a_base_that_is_cut_during_the_run_is_an_error_not_a_crash(small, tmp_path):
    """A shard that has not been read yet loses its end: exit 3 or 6, no core dump, no output."""
    place = copied(tmp_path, small)
    process = start(place, faults="rename,SIGSTOP,1,.safetensors.tmp")
    stopped(process)
    os.truncate(place / "base" / "model-00003-of-00004.safetensors", 5000)
    os.kill(process.pid, signal.SIGCONT)
    assert_failed(ended(process), place, (3, 6), "model-00003-of-00004.safetensors: changed while it was read")


def rewrite(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(-100, os.SEEK_END)
        f.write(bytes(100))


def replace(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.with_name("fresh").write_bytes(data)
    facts = path.stat()
    os.utime(path.with_name("fresh"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    path.with_name("fresh").rename(path)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 4])
@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, empty])
def test_a_base_that_changes_during_the_run_is_noticed(small, tmp_path, change, shard):
    """Size, time and inode are compared at the end, for shards that were read before the change and after it."""
    place = copied(tmp_path, small)
    process = start(place, faults="rename,SIGSTOP,2,.safetensors.tmp")
    stopped(process)
    change(place / "base" / f"model-{shard:05}-of-00004.safetensors")
    os.kill(process.pid, signal.SIGCONT)
    assert_failed(ended(process), place, (3, 6), f"model-{shard:05}-of-00004.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("change", [rewrite, replace])
def test_an_adapter_that_changes_during_the_run_is_noticed(small, tmp_path, change):
    """Training writes the next step over the adapter while it is merged: no half of this and half of that."""
    place = copied(tmp_path, small)
    process = start(place, faults="rename,SIGSTOP,2,.safetensors.tmp")
    stopped(process)
    change(place / "lora" / "adapter_model.safetensors")
    os.kill(process.pid, signal.SIGCONT)
    assert_failed(ended(process), place, (3, 6), "adapter_model.safetensors")


@pytest.mark.slow
def test_a_base_that_changed_between_two_runs_is_not_mixed(small, tmp_path):
    """Killed, then the base is rewritten: the rerun refuses the old half; with --overwrite it begins anew."""
    place = copied(tmp_path, small)
    run(place, faults="rename,SIGKILL,3,.safetensors.tmp")
    rewrite(place / "base" / "model-00001-of-00004.safetensors")
    assert_failed(run(place), place, 2, "was left by another job; delete it, or use --overwrite")
    assert "there already" not in run(place, "--overwrite").out
    again = tree(place / "out")
    shutil.rmtree(place / "out")
    assert running.merged(place) == again


# -- limits and company


@pytest.mark.slow
def test_more_shards_than_file_descriptors_are_merged(tmp_path):
    """60 shards with ulimit -n 24, by eight threads."""
    many = model(tmp_path / "many", shards=60, hidden=64)
    assert running.merged(at(tmp_path / "place", many), "--workers", "8", before=limited("-n 24")) == many.wanted


@pytest.mark.slow
def test_a_limit_on_memory_is_kept_or_named(large, tmp_path):
    """64 MB of address space and more beyond what a rehearsal needs: the run finishes, or exits with 6 in words."""
    place = at(tmp_path, large)
    floor = rehearsal_floor(place)
    for extra in (64, 96, 128, 256):
        found = run(place, before=limited(f"-v {(floor + extra) << 10}"))
        if found.code:
            assert_failed(found, place, 6, "memory")
        else:
            assert tree(place / "out") == large.wanted
            shutil.rmtree(place / "out")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [0, 16, 32])
def test_memory_that_ends_inside_a_library_leaves_nothing_half_done(large, tmp_path, extra):
    """Below that OpenBLAS may end the process by itself: with a line and no output all the same, and the rerun goes on."""
    place = at(tmp_path, large)
    found = run(place, before=limited(f"-v {(rehearsal_floor(place) + extra) << 10}"))
    if found.code:
        assert found.code > 0  # no signal, no core dump
        assert len(found.lines) == 1, found.err
        assert "memory" in found.err.lower()
        assert not (place / "out").exists()
        assert_resumes(place, large)


def rehearsal_floor(place: Path) -> int:
    """The MB of address space in which a dry run succeeds."""
    return next(mb for mb in range(96, 1024, 32) if run(place, "--dry-run", before=limited(f"-v {mb << 10}")).code == 0)


@pytest.mark.slow
def test_of_two_runs_into_one_output_one_wins_and_the_other_says_why(large, tmp_path):
    """Started together: one finishes as if alone, the other ends at once and names the first, or finds its output."""
    place = at(tmp_path, large)
    found = sorted((ended(p) for p in [start(place), start(place)]), key=lambda e: e.code)
    assert found[0].code == 0, found
    assert found[1].code in (2, 6)
    assert re.search(r"in use by (pid \d+ on|another run)|is not empty", found[1].err), found
    assert len(found[1].lines) == 1
    assert tree(place / "out") == large.wanted


@pytest.mark.slow
def test_a_run_that_comes_too_late_does_not_remove_what_the_other_one_works_in(small, tmp_path):
    """It made OUT.partial, the other run locked it first: the one that is refused leaves the folder alone."""
    place = at(tmp_path, small)
    late = start(place, faults=f"fsync,SIGSTOP,1,{tmp_path.name}")  # right after mkdir OUT.partial
    stopped(late)
    first = start(place, faults="rename,SIGSTOP,2,.safetensors.tmp")
    stopped(first)
    os.kill(late.pid, signal.SIGCONT)
    assert f"in use by pid {first.pid}" in ended(late).err
    os.kill(first.pid, signal.SIGCONT)
    found = ended(first)
    assert found.code == 0, found.err
    assert tree(place / "out") == small.wanted


@pytest.mark.slow
def test_a_second_run_during_the_first_names_its_pid(small, tmp_path):
    """The first is held still in its second shard; the other one exits 6 and disturbs nothing."""
    place = at(tmp_path, small)
    first = start(place, faults="rename,SIGSTOP,2,.safetensors.tmp")
    stopped(first)
    second = run(place)
    os.kill(first.pid, signal.SIGCONT)
    assert second.code == 6
    assert f"in use by pid {first.pid} on " in second.err
    assert ended(first).code == 0
    assert tree(place / "out") == small.wanted


@pytest.mark.slow
def test_a_lock_of_a_dead_process_does_not_lock(small, tmp_path):
    """A lock file with a pid that is gone, or that is another program now, is taken over."""
    place = at(tmp_path, small)
    run(place, faults="rename,SIGKILL,3,.safetensors.tmp")
    lock = place / "out.partial" / ".lock"
    assert lock.exists()
    lock.write_text(f"{os.getpid()} {os.uname().nodename}\n")
    assert_resumes(place, small)


# -- the same bytes always


WORLDS = [
    {"PYTHONHASHSEED": "0", "workers": "1"},
    {"PYTHONHASHSEED": "1", "workers": "2", "TZ": "Pacific/Apia", "SOURCE_DATE_EPOCH": "0"},
    {"PYTHONHASHSEED": "2", "workers": "3", "LC_ALL": "C"},
    {"PYTHONHASHSEED": "3", "workers": "4", "LC_ALL": "tr_TR.UTF-8"},
    {"PYTHONHASHSEED": "4", "workers": "5", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONHASHSEED": "5", "workers": "6", "LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii", "TZ": "UTC+12"},
    {"PYTHONHASHSEED": "6", "workers": "7", "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
    {"PYTHONHASHSEED": "20", "workers": "8", "PYTHONUTF8": "1", "LANG": "de_DE.ISO-8859-1", "PYTHONOPTIMIZE": "2"},
]


@pytest.mark.slow
def test_hash_seed_locale_time_zone_and_workers_change_no_byte(large, tmp_path):
    """One sha256 for every file, the manifest included, over eight different worlds."""

    def job(k: int, world: dict[str, str]) -> dict[str, str]:
        env = os.environ | {name: value for name, value in world.items() if name != "workers"}
        return running.merged(at(tmp_path / str(k), large), "--workers", world["workers"], env=env)

    for found in together(job, list(enumerate(WORLDS))):
        assert found == large.wanted


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 5])
def test_names_beyond_ascii_work_in_every_locale(tmp_path_factory, world):
    """Folders, tensors and adapter keys in other alphabets, with a Python that thinks in ASCII."""
    made = model(tmp_path_factory.mktemp("módèl-层"), shards=2, hidden=64, prefix="mödel.层")
    place = at(tmp_path_factory.mktemp("ausgang-ß-🦙"), made)
    env = os.environ | {name: value for name, value in WORLDS[world].items() if name != "workers"}
    assert running.merged(place, env=env) == made.wanted


@pytest.mark.slow
def test_inputs_from_the_future_merge_to_the_same_weights(small, tmp_path):
    """A clock that was set back: only the manifest's plan knows about times."""
    place = copied(tmp_path, small)
    for path in [*(place / "base").iterdir(), *(place / "lora").iterdir()]:
        os.utime(path, (4e9, 4e9))
    assert weights(running.merged(place)) == weights(small.wanted)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o077, 0o000, 0o022])
def test_a_bare_environment_is_enough(small, tmp_path, umask):
    """No HOME, no PATH, no TMPDIR: the same bytes, and files with the mode that the umask asks for."""
    place = at(tmp_path, small)
    found = run(place, env={"TMPDIR": "/not/there"}, umask=umask)
    assert found.code == 0, found.err
    assert tree(place / "out") == small.wanted
    assert {p.stat().st_mode & 0o777 for p in (place / "out").iterdir()} == {0o666 & ~umask}
    assert (place / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.slow
def test_a_home_that_cannot_be_written_does_not_matter(small, tmp_path):
    """HOME is /proc, where not even root can make a file."""
    assert (
        running.merged(at(tmp_path, small), env=os.environ | {"HOME": "/proc", "HF_HOME": "/proc/hf"}) == small.wanted
    )


# -- nobody listens


def test_a_full_device_as_stdout_is_an_error_without_a_traceback(small, tmp_path):
    """The result cannot be printed: exit 6 or 141 with one line at most, and the output is whole."""
    with open("/dev/full", "w") as full:
        found = run(at(tmp_path, small), stdout=full)
    assert "Traceback" not in found.err, found.err
    assert "bug of ours" not in found.err
    assert found.code in (6, 141)
    assert len(found.lines) <= 1
    assert tree(tmp_path / "out") == small.wanted


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--json",), ("--dry-run",)], ids=["sentence", "json", "rehearsal"])
@pytest.mark.parametrize("device", ["closed pipe", "full device", "closed"])
def test_nobody_listening_on_stdout_is_not_a_bug(small, tmp_path, device, options):
    """`| head -0`, `>/dev/full`, `>&-`: no traceback, an exit code for it, and complete output where there is any."""
    place = at(tmp_path, small)
    reader, writer = os.pipe()
    os.close(reader)
    before = ["sh", "-c", 'exec "$@" >&-', "sh"] if device == "closed" else None
    with open("/dev/full", "w") as full, open(writer, "w") as pipe:
        found = run(place, *options, stdout={"closed pipe": pipe, "full device": full}.get(device), before=before)
    assert "Traceback" not in found.err, found.err
    assert "bug of ours" not in found.err, found.err
    assert found.code in ((0, 6) if device == "closed" else (6, 141)), found
    assert len(found.lines) <= 1
    if "--dry-run" not in options:
        assert tree(place / "out") == small.wanted


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_up_in_the_output(small, tmp_path, closed):
    """Files get the numbers 0 to 2 then; nothing that is said may be written into them."""
    place = at(tmp_path, small)
    found = run(place, before=["sh", "-c", f'exec "$@" {closed}', "sh"])
    assert found.code in (0, 6), found
    assert tree(place / "out") == small.wanted


@pytest.mark.slow
@pytest.mark.parametrize("device", ["/dev/full", "closed"])
def test_a_failure_that_nobody_hears_keeps_its_exit_code(small, tmp_path, device):
    """stderr is full or closed: exit 2 for an output that is there, all the same."""
    place = at(tmp_path, small)
    (place / "out").mkdir()
    (place / "out" / "theirs").write_text("x")
    end = "2>&-" if device == "closed" else "2>/dev/full"
    assert run(place, before=["sh", "-c", f'exec "$@" {end}', "sh"]).code == 2


# -- planted code


PLANTED = [
    "torch",
    "json",
    "numpy",
    "sitecustomize",
    "usercustomize",
    "click",
    "ml_dtypes",
    "regex",
    "threadpoolctl",
    "rich",
]
PLANTED += ["adaptkit", "modeling_llama", "encodings", "re", "llama", "safetensors"]


def planted(place: Path) -> Path:
    """Modules beside the weights that leave a mark when they are run."""
    for name in PLANTED:
        (place / "base" / f"{name}.py").write_text(f"open({str(place / 'ran')!r}, 'a').write({name + chr(10)!r})\n")
    return place / "base"


@pytest.mark.parametrize(
    "command",
    [running.COMMAND, [str(Path(sys.executable).with_name("adaptkit"))]],
    ids=["module", "script"],
)
def test_code_that_lies_in_the_model_folder_is_not_run(small, tmp_path, command):
    """Merging from within a folder that has a torch.py, json.py, numpy.py: they are not imported."""
    if not Path(command[0]).exists():
        pytest.skip("the console script is not installed")
    cwd = planted(copied(tmp_path, small))
    found = subprocess.run([*command, "merge", ".", "../lora", "-o", "../out"], cwd=cwd, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert not (tmp_path / "ran").exists()
    assert weights(small.wanted).items() <= tree(tmp_path / "out").items()
