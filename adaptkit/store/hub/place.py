"""A folder or an id as a folder on this machine: itself, or what the cache of huggingface_hub holds of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...errors import Hub, Mismatch, System, Usage, quoted
from .. import disk
from . import talk
from .choose import CONFIG, below, chosen, folders_with
from .crew import Crew
from .fetch import Repo, download, repo_at
from .ids import SHA, Ref, is_revision, ref_of

Progress = Callable[[int, int], None]
AT_ONCE = 4  # files


def place(
    source: str | Path,
    kind: str = "any",
    *,
    bare: bool = False,
    progress: Progress | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    sub: str = "",
) -> Path:
    """Where a model or adapter lies on this machine, fetched when it is the Hub's.

    source: a path, or text that may be an id; what exists here wins, and a Path is a path.   kind: "model", "adapter".
    bare: whether one word may be an id.   Raises Hub, and Mismatch when the repository holds the other kind.
    """
    if isinstance(source, Path) or Path(source).exists():
        return Path(source, sub)
    ref = ref_of(source, bare=bare)
    if ref is None:
        return Path(source, sub)
    if revision is not None and not is_revision(revision):
        raise Usage(f"{quoted(revision)!r} is no revision", where="revision", hint="give a branch, a tag or a commit")
    ref = Ref(ref.id, revision or ref.revision, "/".join(filter(None, (ref.sub, sub))))
    folder = Path(cache_dir) if cache_dir else talk.cache()
    if local_files_only or talk.offline():
        return cached(ref, kind, folder, "local_files_only" if local_files_only else talk.OFFLINE)
    return fetched(repo_at(ref, token), kind, folder, progress)


def wanted(repo: Repo, kind: str) -> list[str]:
    """The files of a repository that matter, by their names in it. Raises Hub when there are none."""
    sub, known = repo.ref.sub, below(repo.files, repo.ref.sub)
    if not known:
        raise Hub(f"has no folder {sub!r}", where=f"hub: {repo.ref.id}", hint=_elsewhere(repo))
    if sub in repo.files:
        top = sub.rpartition("/")[0]
        settings = [f"{top}/{n}".lstrip("/") for n in (CONFIG, "config.json")]
        return [*[n for n in settings if n in repo.files][:1], sub]
    if CONFIG not in known and "config.json" not in known and (hint := _elsewhere(repo)):
        raise Hub("holds neither a model nor an adapter at its top", where=f"hub: {repo.ref}", hint=hint)
    path = f"{sub}/" if sub else ""
    try:
        found = chosen({n: f.size for n, f in known.items()}, kind, lambda n: repo.read(path + n))
    except Mismatch as e:
        raise e.at(f"hub: {repo.ref}") from None
    if not found:
        raise Hub("holds neither a model nor an adapter", where=f"hub: {repo.ref}")
    return [path + n for n in found]


def _elsewhere(repo: Repo) -> str | None:
    """Folders that hold an adapter or a model, as a hint."""
    found = folders_with(repo.files, CONFIG) or folders_with(repo.files, "config.json")
    return f"there is {found}; write {repo.ref.id}/FOLDER" if found else None


def fetched(repo: Repo, kind: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The snapshot in the cache, with the files that matter."""
    names = wanted(repo, kind)
    store = cache_dir / f"models--{repo.ref.id.replace('/', '--')}"
    missing = [n for n in names if not (store / "blobs" / repo.files[n].digest).exists()]
    enough_room(repo, missing, store)
    many(repo, names, lambda name, tick: _into_cache(repo, name, cache_dir, store, tick), progress)
    return store / "snapshots" / repo.sha / repo.ref.sub


def enough_room(repo: Repo, names: list[str], where: Path) -> None:
    """Raise System before a byte is fetched that has no room."""
    free, _ = disk.room(where.absolute())
    need = sum(repo.files[n].size for n in names)
    if need * 1.02 > free:
        words = f"{repo.ref} needs {disk.human(need)}, {disk.human(free)} free; nothing was fetched"
        raise System(words, where=where.parent, hint="set HF_HOME to a larger disk")


def many(
    repo: Repo, names: list[str], one: Callable[[str, Callable[[int], None]], None], progress: Progress | None
) -> None:
    """Fetch several files at once. one: fetches a file and ticks."""
    total, lock, done = sum(repo.files[n].size for n in names), threading.Lock(), [0]
    with Crew(AT_ONCE) as crew:

        def tick(n: int) -> None:
            crew.check()
            with lock:
                done[0] += n
                if progress:
                    progress(max(0, min(done[0], total)), total)

        if progress and hasattr(progress, "label"):
            progress.label(f"fetching {repo.ref}")
        for job in [crew.begin(one, name, tick) for name in names]:
            job.result()
        if progress and hasattr(progress, "label"):
            progress.label(None)


def _into_cache(repo: Repo, name: str, cache_dir: Path, store: Path, tick: Callable[[int], None]) -> None:
    """Put a file where the client looks for it, in the layout that it documents for its cache.

    Not by the client itself: it would take the file's name from the header of another answer, and trust it.
    """
    file = repo.files[name]
    pointer = store / "snapshots" / repo.sha / name
    blob, part = store / "blobs" / file.digest, store / "blobs" / f"{file.digest}.adaptkit"
    if not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with alone(cache_dir / ".locks" / store.name / f"{file.digest}.adaptkit.lock"):
            if not blob.exists():
                download(repo, name, part, tick)
                os.replace(part, blob)
    else:
        tick(file.size)
    if not pointer.exists():
        _point(pointer, blob)
    _remember(store, repo.ref.revision or "main", repo.sha)


def _point(pointer: Path, blob: Path) -> None:
    """A relative symlink, or a copy where the file system has none."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    tmp = pointer.with_name(f".{pointer.name}.{threading.get_ident()}.tmp")
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), tmp)
    except OSError:
        shutil.copyfile(blob, tmp)
    os.replace(tmp, pointer)


def _remember(store: Path, revision: str, sha: str) -> None:
    """Note which commit a branch is, as the client does, for the next time without a network."""
    ref = store / "refs" / revision
    if SHA.fullmatch(revision) or (ref.exists() and ref.read_text() == sha):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    tmp = ref.with_name(f".{ref.name}.{threading.get_ident()}")
    tmp.write_text(sha)
    os.replace(tmp, ref)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process fetches the same file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # the file stays: deleting it would let in a third while a second waits


def cached(ref: Ref, kind: str, cache_dir: Path, rule: str = talk.OFFLINE) -> Path:
    """The snapshot that is in the cache already. rule: what forbids to ask the Hub. Raises Hub when it lacks something."""
    store = cache_dir / f"models--{ref.id.replace('/', '--')}"
    revision = ref.revision or "main"
    noted = store / "refs" / revision
    sha = noted.read_text().strip() if noted.is_file() else revision
    top = store / "snapshots" / sha
    where, why = f"hub: {ref}", f"and {rule} is set"
    if not SHA.fullmatch(sha) or not top.is_dir():
        raise Hub(
            f"is not in the cache, {why}", where=where, hint="unset it, or run `adaptkit pull` where there is a network"
        )
    sizes = _sizes(top)
    known = below(sizes, ref.sub)
    try:
        names = chosen(known, kind, lambda n: (top / ref.sub / n).read_bytes()) if ref.sub not in sizes else [ref.sub]
    except Mismatch as e:
        raise e.at(where) from None
    except Exception as e:
        raise Hub(f"is only partly in the cache ({e}), {why}", where=where, hint="unset it") from None
    if not names:
        raise Hub(f"is only partly in the cache, {why}", where=where, hint="unset it")
    return top / ref.sub


def _sizes(top: Path) -> Mapping[str, int]:
    return {p.relative_to(top).as_posix(): p.stat().st_size for p in sorted(top.rglob("*")) if p.is_file()}
