"""A model of the Hub by its headers: small files as they are, weight files as holes of the right size behind a header.

Whatever reads headers, as planning does, works on such a folder as on the model. A hole takes no room on the disk.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import Corrupt, Mismatch
from ..safetensors import LARGEST
from . import talk
from .choose import CONFIG
from .crew import Crew
from .fetch import File, Repo, digest_of, download, repo_at
from .ids import ref_of
from .place import AT_ONCE, place, wanted

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
FIRST = 1 << 16  # bytes that hold most headers


def ghost(repo: Repo, root: Path, names: list[str] | None = None) -> Path:
    """The folder below `root`, laid out as in a cache, so that it tells where it is from. Raises Mismatch without safetensors."""
    names = wanted(repo, "model") if names is None else names
    top = root / f"models--{repo.ref.id.replace('/', '--')}" / "snapshots" / repo.sha
    weights = [n for n in names if n.endswith(WEIGHTS)]
    if pickled := [n for n in weights if not n.endswith(".safetensors")]:
        words = f"{pickled[0]} has no header that could be read alone"
        raise Mismatch(words, where=f"hub: {repo.ref}", hint="pull the model first, or use one in safetensors")
    with Crew(2 * AT_ONCE) as crew:
        for job in [crew.begin(_hole if n in weights else _small, repo, n, top / n) for n in names]:
            job.result()
    return top / repo.ref.sub


def _small(repo: Repo, name: str, path: Path) -> None:
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        download(repo, name, part, lambda n: None)
        os.replace(part, path)


def _hole(repo: Repo, name: str, path: Path) -> None:
    """A file that has its header, and nothing behind it; one that an earlier run has filled stays."""
    if is_whole(path, repo.files[name]):
        return
    raw = header(repo, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(repo.files[name].size)


def is_whole(path: Path, file: File) -> bool:
    """Whether a file is no hole."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return False
    full = facts.st_size == file.size and facts.st_blocks * 512 >= file.size
    return full and digest_of(path, file) == file.digest


def header(repo: Repo, name: str) -> bytes:
    """The first bytes of a safetensors file, up to its data."""
    size = repo.files[name].size
    raw = repo.head(name, FIRST)
    if len(raw) == size:
        return raw  # all there is, whatever it is: planning says what is wrong with it
    length = 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    if not 8 < length <= min(size, LARGEST):
        raise Corrupt("this is not a safetensors file", where=f"hub: {repo.ref}/{name}", hint="look at the repository")
    return raw[:length] if length <= len(raw) else repo.head(name, length)


@contextmanager
def glance(source: str | Path, kind: str = "any", progress: Callable[[int, int], None] | None = None) -> Iterator[Path]:
    """A folder to look at: as `place` gives it, but a model of the Hub by its headers only."""
    ref = None if isinstance(source, Path) or Path(source).exists() else ref_of(source)
    repo = repo_at(ref) if ref and not talk.offline() else None
    if repo is None or (kind != "model" and _is_adapter(repo)) or not _has_safetensors(repo):
        yield place(source, kind, progress=progress)
        return
    with tempfile.TemporaryDirectory(prefix="adaptkit-") as folder:
        yield ghost(repo, Path(folder))


def _is_adapter(repo: Repo) -> bool:
    sub = f"{repo.ref.sub}/" if repo.ref.sub else ""
    return sub + CONFIG in repo.files


def _has_safetensors(repo: Repo) -> bool:
    sub = f"{repo.ref.sub}/" if repo.ref.sub else ""
    return any(n.startswith(sub) and n.endswith(".safetensors") for n in repo.files)
