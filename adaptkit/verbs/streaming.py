"""Merging from the Hub to the Hub: download a shard, merge it, upload it, forget it; one commit at the end.

Planning reads headers only. At any time the disk holds the shard that is made, its inputs, and those of the next one.
A small journal says what is uploaded; a run killed anywhere goes on from there, and until the commit nobody sees a thing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..engines import layout
from ..engines.device import checked
from ..engines.local import Local
from ..engines.plan import Plan, Target
from ..engines.survival import Survival
from ..errors import AdaptKitError, AdaptKitWarning, Hub, System
from ..store import disk, journal
from ..store.arrays import load
from ..store.checkpoint import stamps, unchanged, warn
from ..store.entry import Entry
from ..store.hub import Ref, origin, ref_of, talk
from ..store.hub.fetch import File, Repo, digest_of, repo_at
from ..store.hub.ghost import ghost
from ..store.hub.ids import RECEIPT
from ..store.hub.place import wanted
from ..store.output import BAD_INPUT
from . import card as cards
from . import merge as merging
from . import publish
from .inputs import Progress, Source, adapters_of, files_of, opened
from .push import writable
from .workbench import Bench, Inputs

NO_COPY = "no-copy"  # the journal's word for: this Hub does not copy these shards


def stream(
    base: str | Path,
    adapters: Sequence[Source],
    push: str,
    how: dict[str, Any],
    options: dict[str, Any],
    *,
    private: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> merging.Merged:
    """Merge shard by shard into a repository. how, options: as `planned` takes and as its plan keeps. Raises as merge does."""
    start = time.monotonic()
    target = writable(push)
    repo = _repo(base)
    read = adapters_of(list(adapters), progress)
    key = _key(target, f"{repo.ref}={repo.sha}" if repo else _local(Path(base)), read, {**how, **options})
    root = talk.home() / "adaptkit" / "streaming" / key[:24]
    with _held(root), _swept(root):
        folder = ghost(repo, root / "base", wanted(repo, "model")) if repo else Path(base)
        plan = merging.planned(opened(folder), read, **how)
        plan.options |= options
        run = _Run(plan, repo, target, root, key, workers, progress)
        try:
            merged = run.through(private)
        finally:
            run.close()
        shutil.rmtree(root, ignore_errors=True)
    merged.seconds = time.monotonic() - start
    return merged


def _repo(base: str | Path) -> Repo | None:
    """The repository of the base, None when it lies here."""
    if isinstance(base, Path) or Path(base).exists():
        return None
    ref = ref_of(base)
    return repo_at(ref) if ref else None


def _local(base: Path) -> str:
    """What tells a base that lies here from another."""
    files = sorted(p for p in base.rglob("*") if p.is_file()) if base.is_dir() else [base]
    return str([base.resolve(), *stamps(p for p in files if p.exists()).items()])


def _key(target: Ref, base: str, adapters: Sequence[Adapter], options: dict[str, Any]) -> str:
    """A hash of everything that the result depends on."""
    h = hashlib.sha256(json.dumps([version("adaptkit"), str(target), base, options], default=str).encode())
    for adapter in adapters:
        h.update(json.dumps(adapter.about, sort_keys=True, default=str).encode())
        for file in files_of(adapter):
            h.update(digest_of(file, File(0, "0" * 64)).encode())
        for name, value in _in_memory(adapter):
            h.update(name.encode() + load(value).tobytes())
    return h.hexdigest()


def _in_memory(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """What tells an adapter's numbers that are in no file."""
    for path, site in adapter.sites.items():
        held = {k: v for k, v in site.params.items() if not isinstance(v, Entry)}
        yield from ((f"{path} {k} {site.tuner!r}", v) for k, v in held.items())
    yield from ((n, v) for n, v in adapter.whole.items() if not isinstance(v, Entry))


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """The folder of this job, for one run at a time."""
    fd = _locked(root / ".lock")
    while not _is_at(fd, root / ".lock"):  # the run before us has deleted the folder meanwhile
        os.close(fd)
        fd = _locked(root / ".lock")
    try:
        yield
    finally:
        os.close(fd)


def _locked(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise System("another run does the same merge", where="--streaming") from e
    return fd


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _swept(root: Path) -> Iterator[None]:
    """Leave nothing when the same command could not go on anyway."""
    try:
        yield
    except BAD_INPUT:
        shutil.rmtree(root, ignore_errors=True)
        raise


class _Run:
    """One streaming merge."""

    def __init__(
        self,
        plan: Plan,
        repo: Repo | None,
        target: Ref,
        root: Path,
        key: str,
        workers: int | None,
        progress: Progress | None,
    ):
        self.plan, self.repo, self.target, self.root, self.workers = plan, repo, target, root, workers
        self.report, self.survival, self.said = progress, Survival(), {}
        self.inputs = Inputs(repo, plan, root)
        plan_id, done, _ = journal.read(root) if (root / journal.NAME).exists() else ("", {}, 0)
        self.done = done if plan_id == key else {}
        self.resumed = sum("sha256" in r for r in self.done.values())
        self.journal = journal.Journal(root, key, self.done.values())

    def close(self) -> None:
        self.inputs.close()
        self.journal.close()

    def through(self, private: bool) -> merging.Merged:
        """Everything, from the first shard to the commit."""
        self._room()
        inputs = [self.plan.checkpoint.path, *self.plan.adapters]
        there = publish.prepared(self.target, private, [r.id for r in map(origin, inputs) if r])
        self._forget_swept()
        self._shards()
        merged = merging.Merged(
            None, [t.name for t in self.plan.changed], len(self.plan.targets), self.plan.nbytes, 0.0
        )
        merged.resumed = self.resumed
        merging.survived(self.plan, self.survival, merged)
        for text in self.said:
            warnings.warn(text, AdaptKitWarning, stacklevel=2)
        try:
            merged.pushed = self._commit(there, merged)
        except AdaptKitError as e:
            if not self.copies or not _about_copying(e):
                raise
            warn(f"the Hub does not copy shards from {self.repo.ref.id} to {self.target.id}: they go by this machine")
            self._note({"name": NO_COPY, "size": 0})
            return self.through(private)
        return merged

    def _room(self) -> None:
        """Raise System when three shards would not fit on the disk."""
        largest = max(sum(t.nbytes for t in targets) for targets in self.plan.files.values())
        free, _ = disk.room(self.root)
        free += sum(p.lstat().st_blocks * 512 for p in self.root.rglob("*"))  # an earlier run's
        if 3 * largest > free:
            words = f"needs {disk.human(3 * largest)} for three shards, {disk.human(free)} free"
            raise System(words, where="--streaming", hint="set HF_HOME to a larger disk")

    # -- shards

    @property
    def copies(self) -> dict[str, str]:
        """Output file -> file of the base's repository, for those that the Hub can copy by itself."""
        if self.repo is None or NO_COPY in self.done:
            return {}
        names = {}
        for name, targets in self.plan.files.items():
            same = layout.same_file(self.plan.checkpoint, targets, self.plan.metadata.get(name, {}))
            if same is not None:
                names[name] = self.inputs.name(same)
        return names

    def _shards(self) -> None:
        """Make and upload every file that is not uploaded yet."""
        copies = self.copies
        todo = [n for n in self.plan.files if n not in copies and "sha256" not in self.done.get(n, {})]
        sent = sum(self._size(n) for n in self.plan.files if n not in todo)
        self._show(sent)
        self.inputs.will(n for name in todo if not self._made(name) for n in _sources(self.plan.files[name]))
        for k, name in enumerate(todo):
            ahead = todo[k + 1] if k + 1 < len(todo) and not self._made(todo[k + 1]) else None
            self._label(f"shard {len(self.plan.files) - len(todo) + k + 1} of {len(self.plan.files)}")
            self._one(name, _sources(self.plan.files[ahead]) if ahead else [])
            sent += self._size(name)
            self._show(sent)
        self.survival = Survival()
        for name in self.plan.files:
            self.survival.add(Survival(**self.done.get(name, {}).get("rounding", {})))

    def _one(self, name: str, next_sources: Sequence[Path]) -> None:
        out = self.root / "out" / name
        if not self._made(name):
            self._make(name, next_sources)
        op = publish.uploaded(self.target, name, out)
        if op._upload_mode != "lfs":  # the client keeps this to itself, and a file inside git would have to stay here
            raise Hub(f"keeps {name} inside git", where=f"hub: {self.target}", hint="push a folder instead")
        record = {**self.done[name], "sha256": op.upload_info.sha256.hex(), "size": out.stat().st_size}
        self._note(record)
        out.unlink()

    def _make(self, name: str, next_sources: Sequence[Path]) -> None:
        sources = _sources(self.plan.files[name])
        self.inputs.get(sources)
        self.inputs.want(next_sources)
        bench = Bench(self.root / "out")
        where = checked(self.plan.options.get("device", "auto"))
        local = Local(self.workers, None, self.plan.options.get("allow_nonfinite", False), where)
        local.write(replace(self.plan, files={name: self.plan.files[name]}), bench)
        if self.repo is None:
            unchanged(self.plan.stamps)
        self.said |= local.warnings
        self.inputs.used(sources)
        self._note({"name": name, "size": (self.root / "out" / name).stat().st_size, **bench.facts})

    def _made(self, name: str) -> bool:
        """Whether an earlier run made this file, and could not upload it."""
        record = self.done.get(name)
        return record is not None and disk.size_of(self.root / "out" / name) == record["size"]

    def _forget_swept(self) -> None:
        """Forget uploads of an earlier run that the Hub has swept away meanwhile."""
        sent = {n: File(r["size"], r["sha256"]) for n, r in self.done.items() if "sha256" in r}
        held = publish.still_there(self.target, list(sent.values()))
        for name in [n for n, f in sent.items() if f.digest not in held]:
            self._note({"name": name, "size": 0})

    def _note(self, record: dict[str, Any]) -> None:
        self.journal.append(record)
        self.done[record["name"]] = record

    # -- the commit

    def _commit(self, there: Repo, merged: merging.Merged) -> str:
        from huggingface_hub import CommitOperationAdd

        small = dict(merging.beside(self.plan))
        records = [*self._records(), *(_record(n, v) for n, v in small.items())]
        said = {
            "files": sorted(records, key=lambda r: r["name"]),
            **merging.said_of(self.plan, self.survival, merged, self.inputs.facts),
        }
        small[RECEIPT] = (json.dumps(said, indent=1) + "\n").encode()
        if cards.NAME not in there.files:
            sums = {r["name"]: r["sha256"] for r in records}
            small[cards.NAME] = cards.card(self.plan.checkpoint.root, self.target.id, sums, said).encode()
        operations = [
            publish.known_upload(n, File(r["size"], r["sha256"])) for n, r in self.done.items() if "sha256" in r
        ]
        operations += [CommitOperationAdd(n, v if isinstance(v, bytes) else str(v)) for n, v in small.items()]
        operations += self._copied(there)
        removed = publish.stale(there, [*self.plan.files, *small])
        info = publish.commit(there, operations, "model made by adaptkit merge", removed=removed)
        return publish.answered(info, create_pr=False)[0]

    def _records(self) -> list[dict[str, Any]]:
        sent = [{k: r[k] for k in ("name", "size", "sha256")} for r in self.done.values() if "sha256" in r]
        held = {n: self.repo.files[source] for n, source in self.copies.items()} if self.repo else {}
        return sent + [{"name": n, "size": f.size, "sha256": f.digest} for n, f in held.items()]

    def _copied(self, there: Repo) -> list[Any]:
        from huggingface_hub import CommitOperationCopy

        found = []
        for name, source in self.copies.items():
            if there.files.get(name) == self.repo.files[source]:
                continue
            at = {"src_revision": self.repo.sha}
            if self.repo.ref.id != self.target.id:
                at |= {"src_repo_id": self.repo.ref.id, "src_repo_type": "model"}
            try:
                found.append(CommitOperationCopy(source, name, **at))
            except TypeError as e:
                raise Hub("this huggingface_hub copies within a repository only") from e
        return found

    # -- telling

    def _size(self, name: str) -> int:
        return sum(t.nbytes for t in self.plan.files[name])

    def _show(self, sent: int) -> None:
        if self.report:
            self.report(sent, self.plan.nbytes)

    def _label(self, text: str) -> None:
        if self.report and hasattr(self.report, "label"):
            self.report.label(text)


def _sources(targets: Sequence[Target]) -> list[Path]:
    """The files of the base that an output file is made from."""
    return list(dict.fromkeys(t.source.file for t in targets if hasattr(t.source, "file") and not t.replaced))


def _record(name: str, value: Path | bytes) -> dict[str, Any]:
    raw = value if isinstance(value, bytes) else value.read_bytes()
    return {"name": name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _about_copying(e: BaseException | None) -> bool:
    """Whether the Hub refused to copy a file from one repository to another."""
    while e is not None:
        url = str(getattr(getattr(getattr(e, "response", None), "request", None), "url", ""))
        named = type(e).__name__ == "FileDuplicationError" or "Cannot duplicate" in str(e)
        if named or "/lfs-files/duplicate" in url or (isinstance(e, TypeError) and "src_repo" in str(e)):
            return True
        e = e.__cause__
    return False
