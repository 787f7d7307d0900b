"""Running commands as whole processes: wall time, processor time and peak memory, over interleaved rounds."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Runs:
    """What one command took in each round. wall, cpu: seconds.   memory: peak resident bytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def rounds(commands: dict[str, list[str]], count: int, before: Callable[[], None]) -> dict[str, Runs]:
    """Run every command once a round, one after the other, so that a busy minute hits all of them."""
    found = {name: Runs() for name in commands}
    for i in range(count):
        for name, words in commands.items():
            before()
            once(words, found[name])
            print(f"round {i + 1}: {name} {found[name].wall[-1]:.2f} s", file=sys.stderr, flush=True)
    return found


def once(words: list[str], runs: Runs) -> None:
    """One process; raises when it fails, with what it said."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(words)} failed:\n{said.decode()[-2000:]}")
    runs.wall.append(time.perf_counter() - start)
    runs.cpu.append(usage.ru_utime + usage.ru_stime)
    runs.memory.append(usage.ru_maxrss * 1024)


def table(found: dict[str, Runs], floor: str) -> str:
    """A Markdown table of medians, with the ratio of wall times to the command called `floor`, round by round."""
    lines = [f"| command | wall s | x {floor} | CPU s | peak memory MB |", "|---|--:|--:|--:|--:|"]
    for name, runs in found.items():
        ratio = statistics.median(a / b for a, b in zip(runs.wall, found[floor].wall, strict=True))
        wall, cpu = statistics.median(runs.wall), statistics.median(runs.cpu)
        lines.append(f"| {name} | {wall:.2f} | {ratio:.2f} | {cpu:.2f} | {max(runs.memory) / 1e6:.0f} |")
    return "\n".join(lines)


def machine() -> str:
    """What ran: cores, memory, versions, load."""
    from importlib.metadata import version

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("adaptkit", "numpy", "ml_dtypes", "torch", "transformers", "peft")
    versions = ", ".join(f"{n} {version(n)}" for n in names)
    return f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.machine()}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}"
