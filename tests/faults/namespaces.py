"""File systems of our own in a mount namespace of our own: nothing is seen outside, nothing is left to clean up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def permitted() -> bool:
    """Whether this user may mount."""
    try:
        return (
            subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
            == 0
        )
    except OSError:
        return False


@dataclass
class Mounted:
    """A folder with another file system on it. enter: what goes before a command that is to see it."""

    pid: int
    folder: Path

    @property
    def enter(self) -> list[str]:
        # nsenter leaves the working folder alone, but that one was looked up outside: look it up again
        return ["nsenter", f"--target={self.pid}", "--mount", "env", "-C", str(self.folder)]

    @property
    def inside(self) -> Path:
        """The folder as it looks from within, for those outside."""
        return Path(f"/proc/{self.pid}/root{self.folder}")

    def remount(self, options: str) -> None:
        enter = ["nsenter", f"--target={self.pid}", "--mount"]
        subprocess.run([*enter, "mount", "-o", f"remount,{options}", str(self.folder)], check=True)


@contextmanager
def mounted(folder: Path, mount: str) -> Iterator[Mounted]:
    """`mount` is the shell command that mounts something on "$0"."""
    keeper = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{mount} && echo ready && read end", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout.readline() == "ready\n"
        yield Mounted(keeper.pid, folder)
    finally:
        keeper.communicate("end\n")
