"""Bytes of the Hub: a repository at one commit, files that resume where they stopped, the first bytes of large ones.

A file counts when its sha256 (git hash, for small files) is the one that the listing of that commit gives. The client's
own downloads begin again after a kill and compare sizes only, so here its session asks for ranges, and the file is ours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import Corrupt, Hub, Unsafe, quoted
from ..checkpoint import LARGEST_JSON
from ..safepaths import plain
from . import talk
from .ids import SCHEME, SHA, Ref, ref_of
from .talking import talking

Tick = Callable[[int], None]
BLOCK = 1 << 20
FRUITLESS = 4  # tries in a row that brought no byte
PATIENCE = 30.0  # seconds for the first answer
ANEW = 4  # times that a file is begun again because its rest is refused


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
        file = self.files[name]
        if file.size > LARGEST_JSON:
            raise Corrupt(f"larger than {LARGEST_JSON:,} bytes", where=name)
        raw = self.head(name, file.size + 1)
        talk.checked_hash(name, _hasher(file, lambda h: h.update(raw)), file.digest)
        return raw

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a file, by a range request; all that there are when it is shorter."""
        wanted = min(count, self.files[name].size)

        def ask() -> bytes:
            raw = bytearray()
            with closing(self.stream(name, 0, count)) as blocks:
                for block in blocks:
                    raw += block
                    if len(raw) >= count:
                        break
            if len(raw) < wanted:
                raise talk.Short
            return bytes(raw[:count])

        with talking(self.ref, self.token):
            return talk.retried(ask) if wanted else b""

    def stream(self, name: str, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """The bytes of a file from `first` on. A server that ignores ranges sends all, `last` and more too."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import hf_raise_for_status

        heads = talk.headers(self.token)
        if first or last is not None:
            heads["Range"] = f"bytes={first}-{'' if last is None else last - 1}"
        how = {"headers": heads, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        with get_session().stream("GET", self.url(name), **how) as response:
            hf_raise_for_status(response)
            skip = first if response.status_code == 200 else 0
            for block in response.iter_bytes():
                if kept := block[skip:]:
                    yield kept
                skip = max(0, skip - len(block))


def repo_at(ref: Ref, token: str | bool | None = None) -> Repo:
    """The newest commit of a revision and what is in it. Raises Hub."""
    from huggingface_hub.hf_api import RepoFile

    client = talk.api(token)
    with talking(ref, token):
        info = talk.retried(lambda: client.model_info(ref.id, revision=ref.revision, timeout=PATIENCE))
        if not SHA.fullmatch(str(info.sha)):
            raise Hub(f"says it is at {quoted(info.sha)!r}, which is not a commit", where=f"hub: {ref}")
        renamed = ref_of(SCHEME + str(info.id or ref.id))
        if renamed is None or renamed.sub or renamed.revision:
            raise Hub(f"calls itself {quoted(info.id)!r}, which is not an id", where=f"hub: {ref}")
        ref = Ref(renamed.id, ref.revision, ref.sub)
        listed = talk.retried(lambda: list(client.list_repo_tree(ref.id, recursive=True, revision=info.sha)))
        files = {f.path: _file(f) for f in listed if isinstance(f, RepoFile) and _may_be_kept(f.path)}
    return Repo(ref, info.sha, files, token)


def _may_be_kept(name: str) -> bool:
    """Whether every file system takes a name; what none here asks for may be called as it likes. Raises Unsafe if it leaves."""
    try:
        return bool(plain(name))
    except Unsafe:
        if ".." in name.replace("\\", "/").split("/") or name.startswith(("/", "\\")):
            raise
        return False


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
    with talking(repo.ref, repo.token):
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
    with open(part, "ab", buffering=0) as file:
        tick(_length(file))
        while (have := _length(file)) < size:
            try:
                _append(repo, name, file, tick)
            except Exception as e:
                fruitless = 0 if _length(file) > have else fruitless + 1
                refused = have and talk.status_of(e) == 416  # what is here is not the beginning of what is there
                if not (talk.passing(e) or refused) or fruitless >= FRUITLESS or anew >= ANEW:
                    raise
                if refused:
                    tick(-have)
                    file.truncate(0)
                    anew += 1
                elif fruitless:
                    talk.pause(e, fruitless - 1)


def _append(repo: Repo, name: str, file: BinaryIO, tick: Tick) -> None:
    """Add what comes. Raises Short when that ends too soon, Hub when it does not end."""
    size, have = repo.files[name].size, _length(file)
    with closing(repo.stream(name, have)) as blocks:
        for block in blocks:
            if len(block) > size - have:
                raise Hub(f"sends more than the {size:,} bytes that it lists")
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
            have += len(block)
            tick(len(block))
    if have < size:
        raise talk.Short


def _length(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


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
