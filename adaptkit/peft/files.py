"""Folders as PEFT lays them out: the default adapter in the folder itself, any other in a folder of its name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import System, Usage, quoted
from ..store.hub import place

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# they speak of the Hub or of the way there, and change nothing for a folder that is here;
# force_download, repo_type and proxies are the client's own matter
HUB = {"revision", "token", "use_auth_token", "cache_dir", "force_download", "local_files_only", "repo_type", "proxies"}


def folder_of(path: str | os.PathLike[str], subfolder: str | None = None, hub: Mapping[str, Any] | None = None) -> Path:
    """The folder of an adapter on this machine, fetched when `path` is a Hub id. Raises Usage when there is none."""
    hub = dict(hub or {})
    if unknown := sorted(set(hub) - HUB):
        raise Usage(f"{', '.join(unknown)} is not known here")
    given = {k: hub[k] for k in ("revision", "cache_dir", "local_files_only") if hub.get(k)}
    token = hub.get("token", hub.get("use_auth_token"))
    source = path if isinstance(path, Path) else os.fspath(path)
    folder = place(source, "adapter", sub=subfolder or "", token=token, **given)
    if not (folder / CONFIG).exists():
        raise Usage(f"holds no {CONFIG}", where=folder, hint="give an adapter's folder or its Hub id")
    return folder


def checked_name(name: str) -> str:
    """An adapter's name, which is also a folder's."""
    if not isinstance(name, str) or not name or set(name) & set("./\\\0"):
        raise Usage(f"{quoted(name)!r} cannot be an adapter's name", hint="use letters, digits, - and _")
    return name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file with sorted keys, that appears whole."""
    text = json.dumps(value, indent=2, sort_keys=True, default=sorted)  # sets are the one thing JSON does not know
    placed(path, lambda p: p.write_text(text, encoding="utf-8"))


def placed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.replace(path)
    except OSError as e:
        raise System(f"cannot be written ({e.strerror or e})", where=path) from e
    finally:
        with contextlib.suppress(OSError):  # there is nothing to remove where the folder is none
            beside.unlink(missing_ok=True)


def grown(model: Any, base: str | None) -> bool:
    """Whether the vocabulary has another size than in the base's folder."""
    file = Path(base or "", "config.json")
    now = getattr(getattr(model, "config", None), "vocab_size", None)
    if not base or not file.is_file() or now is None:
        return False
    return json.loads(file.read_text(encoding="utf-8")).get("vocab_size", now) != now
