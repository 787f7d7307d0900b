"""What a Hub holds: repositories with commits and branches, stored objects, who may do what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".bin", ".pt", ".gguf", ".onnx", ".spm")
WRITE, READ = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_hash(self.data)

    def listed(self, path: str) -> dict[str, Any]:
        """As the tree shows it."""
        found = {"type": "file", "path": path, "size": len(self.data), "oid": git_hash(self.data)}
        if self.lfs:
            found |= {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": 130}, "xetHash": self.oid}
        return found


@dataclass
class Repo:
    """A repository. commits: sha -> (parent, message, files)."""

    id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, tuple[str, str, dict[str, File]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded, by sha256

    def __post_init__(self) -> None:
        self.add("main", {}, "first")

    def add(self, branch: str, files: dict[str, File], message: str) -> str:
        """A commit on a branch."""
        parent = self.branches.get(branch) or self.branches.get("main", "")
        listing = "".join(f"{n}{f.oid}" for n, f in sorted(files.items()))
        sha = hashlib.sha1(f"{self.id}{parent}{message}{listing}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = (parent, message, files)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.sha(revision)][2]

    def bytes(self, revision: str = "main") -> dict[str, bytes]:
        """name -> bytes of everything."""
        return {n: f.data for n, f in self.files(revision).items()}


class State:
    """Everything."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.accepted: set[str] = set()  # gated repositories whose conditions were accepted
        self.can_copy = True

    def repo(self, id: str, kind: str = "model", **options: Any) -> Repo:
        """A repository, made when it is new."""
        key = (kind, id)
        if key not in self.repos:
            self.repos[key] = Repo(id, kind, **options)
        return self.repos[key]

    def put(self, id: str, files: dict[str, bytes] | Path, branch: str = "main", **options: Any) -> str:
        """A commit that adds files, or those of a folder, to a repository."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repo = self.repo(id, **options)
        made = {n: File(data, n.endswith(LFS)) for n, data in files.items()}
        before = repo.files(branch) if repo.sha(branch) else {}
        repo.objects |= {f.oid: f.data for f in made.values() if f.lfs}
        return repo.add(branch, {**before, **made}, "put")
