"""The command line against a Hub on this machine: one fresh process each, with the real huggingface_hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import Server
from .state import WRITE


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


class Shell:
    """Runs adaptkit with a home of its own."""

    def __init__(self, server: Server, home: Path):
        self.server, self.home, self.prefix = server, home, []  # prefix: what goes before the command
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
        self.env |= {
            "HF_ENDPOINT": server.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE,
            "HF_HUB_DISABLE_TELEMETRY": "1", "HOME": str(home), "ADAPTKIT_NO_PLUGINS": "1", "OMP_NUM_THREADS": "1", "ADAPTKIT_RETRY_WAIT": "0.05",
            "NO_PROXY": "*", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip

    def start(self, *args: Any, **env: str | None) -> subprocess.Popen:
        found = {k: v for k, v in (self.env | env).items() if v is not None}
        command = [*self.prefix, sys.executable, "-m", "adaptkit", *map(str, args)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=found, cwd=self.home)

    def __call__(self, *args: Any, **env: str | None) -> Done:
        """Run a command to its end."""
        process = self.start(*args, **env)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        return Done(process.returncode, out, err)

    def killed(self, *args: Any, when: Callable[[], bool]) -> None:
        """Run a command and kill it as soon as something is so."""
        process = self.start(*args)
        end = time.monotonic() + 60
        while not when() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"ended by itself: {err}"
