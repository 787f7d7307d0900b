"""Bytes of the Hub: a repository at one commit, files that resume where they stopped, the first bytes of large ones.

A file counts when its sha256 (git hash, for small files) is the one that the listing of that commit gives. The client's
own downloads begin again after a kill and compare sizes only, so here it moves the bytes, and the file is ours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import Corrupt, Hub, quoted
from ..checkpoint import LARGEST_JSON
from ..safepaths import plain
from . import talk
from .ids import SHA, Ref

Tick = Callable[[int], None]
BLOCK = 1 << 20
MOST = 50 * 10**9  # bytes of a file beyond which the client asks for another protocol
FRUITLESS = 4  # tries in a row that brought no byte


class Enough(Exception):
    """The bytes that were wanted are here."""


@dataclass(frozen=True)
class File:
    """One file of a repository. digest: sha256 of an LFS file, git hash of any other; as the listing says."""

    size: int
    digest: str

    @property
    def large(self) -> bool:
        """Whether it is kept outside git."""
        return len(self.digest) == 64


@dataclass
class Repo:
    """A repository at one commit."""

    ref: Ref
    sha: str
    files: dict[str, File] = field(default_factory=dict)
    token: str | bool | None = None

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.ref.id, name, revision=self.sha)

    def read(self, name: str) -> bytes:
        """The bytes of a small file, checked."""
        import io

        if self.files[name].size > LARGEST_JSON:
            raise Corrupt(f"larger than {LARGEST_JSON:,} bytes", where=name)
        sink = _Sink(io.BytesIO(), self.files[name].size, lambda n: None)
        with talk.talking(self.ref, self.token):
            talk.retried(lambda: self._again(name, sink))
        raw = sink.file.getvalue()
        talk.checked_hash(name, _hasher(self.files[name], lambda h: h.update(raw)), self.files[name].digest)
        return raw

    def _again(self, name: str, sink: _Sink) -> None:
        sink.seek(0)
        sink.truncate()
        self.get(name, sink)

    def get(self, name: str, sink: Any, resume: int = 0, extra: dict[str, str] | None = None) -> None:
        """Let the client write a file from position `resume` on into a file-like object."""
        from huggingface_hub.file_download import http_get

        heads, size = {**talk.headers(self.token), **(extra or {})}, self.files[name].size
        known = None if extra or size > MOST else size
        http_get(self.url(name), sink, resume_size=resume, headers=heads, expected_size=known)

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a file, by a range request."""
        import io

        count = min(count, self.files[name].size)

        def ask() -> bytes:
            sink = _Sink(io.BytesIO(), count, lambda n: None, stop=True)
            with suppress(Enough):
                self.get(name, sink, extra={"Range": f"bytes=0-{count - 1}"})
            return sink.file.getvalue()

        with talk.talking(self.ref, self.token):
            raw = talk.retried(ask)
        if len(raw) < count:
            raise Hub(f"gave {len(raw):,} bytes of {count:,} that were asked for", where=name)
        return raw[:count]


def repo_at(ref: Ref, token: str | bool | None = None) -> Repo:
    """The newest commit of a revision and what is in it. Raises Hub."""
    from huggingface_hub.hf_api import RepoFile

    client = talk.api(token)
    with talk.talking(ref, token):
        info = talk.retried(lambda: client.model_info(ref.id, revision=ref.revision))
        if not SHA.fullmatch(str(info.sha)):
            raise Hub(f"says it is at {quoted(info.sha)!r}, which is not a commit", where=f"hub: {ref}")
        ref = Ref(info.id or ref.id, ref.revision, ref.sub)
        listed = talk.retried(lambda: list(client.list_repo_tree(ref.id, recursive=True, revision=info.sha)))
        files = {plain(f.path): _file(f) for f in listed if isinstance(f, RepoFile)}
    return Repo(ref, info.sha, files, token)


def _file(listed: Any) -> File:
    digest, size = (listed.lfs.sha256, listed.lfs.size) if listed.lfs else (listed.blob_id, listed.size)
    if (
        not isinstance(size, int)
        or size < 0
        or not isinstance(digest, str)
        or len(digest) not in (40, 64)
        or not digest.isalnum()
    ):
        raise Hub(f"lists {quoted(listed.path)} with size {quoted(size)} and hash {quoted(digest)}")
    return File(size, digest)


def download(repo: Repo, name: str, part: Path, tick: Tick) -> None:
    """Bring one file whole and checked to `part`, from where an earlier try stopped. tick: called with bytes.

    Raises Hub when the bytes are wrong twice, or nothing comes any more.
    """
    file = repo.files[name]
    with talk.talking(repo.ref, repo.token):
        for last in (False, True):
            if part.exists() and part.stat().st_size > file.size:
                part.unlink()
            _grow(repo, name, part, tick)
            found = digest_of(part, file)
            if found == file.digest:
                return
            part.unlink()
            tick(-file.size)
            if last:
                talk.checked_hash(name, found, file.digest)


def _grow(repo: Repo, name: str, part: Path, tick: Tick) -> None:
    """Add to `part` until it has its size."""
    size, fruitless, anew = repo.files[name].size, 0, 0
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "r+b" if part.exists() else "x+b", buffering=0) as file:
        have = file.seek(0, os.SEEK_END)
        tick(have)
        while have != size:
            before = have
            try:
                repo.get(name, _Sink(file, size, tick), resume=have)
            except Exception as e:
                have = file.seek(0, os.SEEK_END)
                fruitless = 0 if have > before else fruitless + 1
                refused = talk.status_of(e) == 416 or have > size
                if not (talk.passing(e) or refused) or fruitless >= FRUITLESS or anew >= FRUITLESS:
                    raise
                if refused:  # what is here is not the beginning of what is there
                    anew, have = anew + 1, _emptied(file, tick)
                if fruitless:
                    talk.pause(e, fruitless)
                continue
            have = file.seek(0, os.SEEK_END)


def _emptied(file: Any, tick: Tick) -> int:
    tick(-file.seek(0, os.SEEK_END))
    file.truncate(0)
    return file.seek(0)


class _Sink:
    """The file-like object that the client writes to: counts, and takes no more than was promised."""

    def __init__(self, file: Any, size: int, tick: Tick, stop: bool = False):
        self.file, self.size, self.tick, self.stop = file, size, tick, stop

    def write(self, data: bytes) -> int:
        room = self.size - self.file.tell()
        if len(data) > room and not self.stop:
            raise Hub(f"sends more than the {self.size:,} bytes that it lists")
        view = memoryview(data)[:room]
        while view.nbytes:
            done = self.file.write(view)
            self.tick(done)
            view = view[done:]
        if self.stop and self.file.tell() >= self.size:
            raise Enough
        return len(data)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, at: int) -> int:
        return self.file.seek(at)

    def truncate(self) -> int:
        self.tick(self.file.tell() - self.file.seek(0, os.SEEK_END))
        return self.file.truncate(0)


def digest_of(path: Path, like: File) -> str:
    """The hash of a file, of the kind that `like` has."""

    def feed(h: Any) -> None:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                h.update(block)

    return _hasher(File(path.stat().st_size, like.digest), feed)


def _hasher(file: File, feed: Callable[[Any], None]) -> str:
    h = hashlib.sha256() if file.large else hashlib.sha1(f"blob {file.size}\0".encode())
    feed(h)
    return h.hexdigest()
