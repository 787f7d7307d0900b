"""Ids: user/name[/subfolder][@revision]. What looks like a path never goes to the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdaptKitError, Usage, quoted

PART = re.compile(r"[A-Za-z0-9_](?:[\w.\-]*[\w\-])?", re.ASCII)
REVISION = re.compile(r"[\w.\-/+]+", re.ASCII)
SCHEME = "hf://"
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".json", ".onnx", ".zip", ".txt")
SHA = re.compile(r"[0-9a-f]{40}")
RECEIPT = "adaptkit.json"


@dataclass(frozen=True)
class Ref:
    """A repository, or a folder of one, at a revision; None is the newest."""

    id: str
    revision: str | None = None
    sub: str = ""

    def __str__(self) -> str:
        sub = f"/{self.sub}" if self.sub else ""
        return f"{self.id}{sub}" + (f"@{self.revision}" if self.revision else "")


def ref_of(text: str, *, bare: bool = False) -> Ref | None:
    """The Ref that a text says, None for what must be a path.

    bare: whether one word may be an id, such as the "gpt2" that adapters' settings name.
    """
    explicit = text.startswith(SCHEME)
    head, at, revision = text.removeprefix(SCHEME).partition("@")
    parts = head.split("/")
    if not all(map(_is_part, parts)) or (at and not is_revision(revision)):
        return None
    if len(parts) == 1 and not (bare or explicit):
        return None
    if not explicit and (_is_file(parts) or (not bare and Path(parts[0]).is_dir())):
        return None  # a path with a slip in it: it is not told to others
    return Ref("/".join(parts[:2]), revision or None, "/".join(parts[2:]))


def repo_of(text: str, where: str) -> Ref:
    """The repository that a text names, to be written to. Raises Usage."""
    found = ref_of(text if text.startswith(SCHEME) else SCHEME + text)
    if found is None or found.sub or "/" not in found.id:
        raise Usage(f"{quoted(text)!r} is not a Hub id", where=where, hint="write it as user/name or user/name@branch")
    return found


def _is_part(part: str) -> bool:
    return bool(PART.fullmatch(part)) and len(part) <= 96 and ".." not in part and "--" not in part


def is_revision(text: str) -> bool:
    """Whether a text may name a branch, a tag, a commit or a pull request, and no path out of a folder."""
    return bool(REVISION.fullmatch(text)) and ".." not in text and not text.startswith(("/", "-"))


def _is_file(parts: list[str]) -> bool:
    return len(parts) < 3 and parts[-1].lower().endswith(FILES)


def origin(path: Path) -> Ref | None:
    """The repository and commit that a local folder or file was pulled from, None when it was not."""
    parts = Path(path).absolute().parts
    for i, part in enumerate(parts):
        cached = part.startswith("models--") and parts[i + 1 : i + 2] == ("snapshots",) and len(parts) > i + 2
        if cached and SHA.fullmatch(parts[i + 2]):
            return Ref(part.removeprefix("models--").replace("--", "/"), parts[i + 2], "/".join(parts[i + 3 :]))
    return _noted(Path(path))


def _noted(path: Path) -> Ref | None:
    """What `pull -o` wrote into the folder."""
    from ..checkpoint import read_json

    folder = path if path.is_dir() else path.parent
    try:
        said = read_json(folder / RECEIPT).get("pulled") if (folder / RECEIPT).is_file() else None
    except AdaptKitError:
        return None
    if not isinstance(said, dict) or not SHA.fullmatch(str(said.get("revision"))):
        return None
    found = ref_of(SCHEME + str(said.get("id")))
    return Ref(found.id, said["revision"], found.sub) if found else None


def called(path: Path) -> str:
    """How messages and receipts call a folder: its id if it came from the Hub, else its name, never its path."""
    found = origin(path)
    return str(Ref(found.id, None, found.sub)) if found else Path(path).name
