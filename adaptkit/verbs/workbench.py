"""What the disk holds while a model streams: inputs that come when they are needed and go, and the file that is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..engines.plan import Plan
from ..errors import System
from ..store import disk
from ..store.hub.crew import Crew
from ..store.hub.fetch import File, Repo, download
from ..store.hub.ghost import is_whole


class Inputs:
    """The base's weight files: holes at first, each filled when it is needed, and gone when it was."""

    def __init__(self, repo: Repo | None, plan: Plan, root: Path):
        self.repo, self.root = repo, root
        self.names = {p: self._in_repo(p, plan) for p in plan.checkpoint.files} if repo else {}
        self.crew, self.jobs, self.left = Crew(2), {}, {}

    def _in_repo(self, path: Path, plan: Plan) -> str:
        sub = f"{self.repo.ref.sub}/" if self.repo.ref.sub else ""
        return (
            self.repo.ref.sub
            if plan.checkpoint.path.is_file()
            else sub + path.relative_to(plan.checkpoint.root).as_posix()
        )

    def name(self, path: Path) -> str:
        return self.names[path]

    def facts(self, path: Path) -> File | None:
        """Size and hash of a file that may be a hole, as the Hub lists them."""
        return self.repo.files[self.names[path]] if path in self.names else None

    def will(self, paths: Iterator[Path]) -> None:
        """How often each file will be used."""
        self.left = {}
        for path in paths:
            self.left[path] = self.left.get(path, 0) + 1

    def want(self, paths: Sequence[Path]) -> None:
        """Begin to fetch."""
        for path in paths:
            if path in self.names and path not in self.jobs:
                self.jobs[path] = self.crew.begin(self._fetch, path)

    def get(self, paths: Sequence[Path]) -> None:
        """Wait until files are here."""
        self.want(paths)
        jobs: list[Future] = [self.jobs[p] for p in paths if p in self.jobs]
        for job in jobs:
            job.result()

    def used(self, paths: Sequence[Path]) -> None:
        """Delete what is not needed again."""
        for path in paths:
            self.left[path] = self.left.get(path, 1) - 1
            if path in self.jobs and not self.left[path]:
                del self.jobs[path]
                path.unlink()

    def _fetch(self, path: Path) -> None:
        name = self.names[path]
        file, part = self.repo.files[name], self.root / "in" / hashlib.sha256(name.encode()).hexdigest()[:16]
        if not part.exists() and is_whole(path, file):
            return
        download(self.repo, name, part, lambda n: self.crew.check())
        self.crew.check()
        os.replace(part, path)

    def close(self) -> None:
        self.crew.__exit__()


class Bench:
    """Where one output file is made: what the engine needs of an Output."""

    def __init__(self, partial: Path):
        self.partial, self.facts = partial, {}
        partial.mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> None:
        """No file is here yet."""

    @contextmanager
    def file(self, name: str, size: int | None = None, *, direct: bool = False) -> Iterator[int]:
        path = self.partial / name
        tmp = path.with_name(f".{path.name}.tmp")
        tmp.unlink(missing_ok=True)
        fd = disk.create(tmp, direct=direct)
        try:
            yield fd
            os.fsync(fd)
        except OSError as e:
            raise System(disk.why(e), where="--streaming", hint="free some space and run the same command again") from e
        finally:
            os.close(fd)
        os.replace(tmp, path)

    def record(self, name: str, **facts: Any) -> None:
        self.facts |= facts
