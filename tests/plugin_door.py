"""Plugins without installing them: a folder of .dist-info, which with the plugin's own folder goes on the import path.

Also invented ones, for what strangers' packages may do wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from places import ROOT

from adaptkit import registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = sorted(p.parent for p in (ROOT / "plugins").glob("*/pyproject.toml"))


def declared(site: Path, name: str, entry_points: str) -> None:
    """What pip would write for a package of this name."""
    info = site / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points)


def door(site: Path, folders: list[Path]) -> list[str]:
    """The folders to put on the import path, so that these plugins are as good as installed."""
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        groups = project["entry-points"].items()
        text = "\n".join(
            f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()) for group, points in groups
        )
        declared(site, project["name"], text)
    return [str(site), *map(str, folders)]


@contextmanager
def opened(path: list[str]) -> Iterator[None]:
    """This process sees the plugins."""
    sys.path[:0] = path
    _forget()
    try:
        yield
    finally:
        del sys.path[: len(path)]
        _forget()


def _forget() -> None:
    registry.catalogue.cache_clear()
    registry.load.cache_clear()


def run(path: list[str], *args: str | Path, code: int = 0, **env: str) -> subprocess.CompletedProcess:
    """A command line in a process of its own, with folders on its import path; checks the exit code."""
    command = [sys.executable, "-c", "from adaptkit.cli import main; main()", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), **env}
    done = subprocess.run(command, env=env, cwd=path[0] if path else None, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done
