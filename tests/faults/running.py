"""The command line as a process of its own: started, disturbed, waited for; and what it left behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-P", "-m", "adaptkit"]
QUICK = 2.0  # seconds in which a signal must be answered
PATIENCE = 60


@dataclass
class Ended:
    """How a run ended. code: negative when a signal killed it.    seconds: from the disturbance, if any, to the end."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def start(
    place: Path, *options: str, faults: str = "", before: list[str] | None = None, env: dict | None = None, **how
):
    """`adaptkit merge base lora -o out` in a folder, as a process."""
    env = dict(os.environ if env is None else env)
    if faults:
        env |= {"PYTHONPATH": str(Path(__file__).parent), "FAULTS": faults}
    command = [*(before or []), *COMMAND, "merge", "base", "lora", "-o", "out", *options]
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen(command, cwd=place, env=env, text=True, errors="surrogateescape", **how)


def ended(process: subprocess.Popen) -> Ended:
    """Wait for a process; one that hangs is killed and fails the test."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out or "", err or "", time.monotonic() - begin)


def run(place: Path, *options: str, **how) -> Ended:
    return ended(start(place, *options, **how))


def merged(place: Path, *options: str, **how) -> dict[str, str]:
    """What an undisturbed run leaves."""
    found = run(place, *options, **how)
    assert found.code == 0, found.err
    return tree(place / "out")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, and the sha256 of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finished(partial: Path) -> set[str]:
    """Names of the weight files in a partial folder that are not being written any more."""
    return {p.name for p in partial.glob("*.safetensors") if not p.name.startswith(".")}


def until(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
    """Wait for something to be so; False when the process ended before."""
    while not condition():
        if process.poll() is not None:
            return condition()
        time.sleep(0.001)
    return True


def stopped(process: subprocess.Popen) -> None:
    """Wait until a process has stopped itself."""
    facts = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert facts.si_code == os.CLD_STOPPED, process.communicate()
