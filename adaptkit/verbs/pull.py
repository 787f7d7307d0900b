"""pull: a model or an adapter from the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Corrupt, Hub, Usage, quoted
from ..store.checkpoint import warn
from ..store.hub import Ref, ref_of, talk
from ..store.hub.fetch import Repo, download, repo_at
from ..store.hub.ids import RECEIPT, SCHEME
from ..store.hub.place import cached, fetched, many, wanted
from ..store.output import Output
from ..store.safetensors import load_json


@dataclass
class Pulled:
    """What a pull brought.

    path: the folder.     id, revision: the repository and its commit.    files, bytes: that matter, there now.
    """

    path: Path
    id: str
    revision: str
    files: list[str]
    bytes: int
    resumed: int = 0


def pull(
    repo: str,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pulled:
    """Pull a model or an adapter from the Hub: config, one kind of weights and tokenizer.

    repo: user/name, user/name/subfolder, either with @revision.   output: a folder that appears when it is complete;
    left out, the cache that huggingface_hub keeps.   A pull that was cut is gone on with by the same command.

    Every file is checked against the hash that the Hub lists. Raises Usage, System or Hub.
    """
    ref = ref_of(repo if repo.startswith(SCHEME) else SCHEME + repo)
    if ref is None:
        raise Usage(
            f"{quoted(repo)!r} is not a Hub id", where="REPO", hint="write it as user/name or user/name@revision"
        )
    if talk.offline():
        return _offline(ref, output)
    found = repo_at(ref)
    names = wanted(found, "any")
    size = sum(found.files[n].size for n in names)
    shown = Pulled(Path(), found.ref.id, found.sha, names, size)
    if output is None:
        shown.path = fetched(found, "any", talk.cache(), progress)
    else:
        shown.path, shown.resumed = _into(found, names, Path(output), overwrite, progress)
    return shown


def _offline(ref: Ref, output: str | Path | None) -> Pulled:
    if output is not None:
        raise Hub(
            "HF_HUB_OFFLINE is set", where=f"hub: {ref}", hint="unset it, or copy what `adaptkit pull` without -o shows"
        )
    path = cached(ref, "any", talk.cache())
    files = (
        sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path.name]
    )
    sha = path.parts[path.parts.index("snapshots") + 1]
    return Pulled(path, ref.id, sha, files, sum((path / f).stat().st_size for f in files if path.is_dir()))


def _into(
    repo: Repo, names: list[str], output: Path, overwrite: bool, progress: Callable[[int, int], None] | None
) -> tuple[Path, int]:
    """Build a folder; each file grows under its hash until it is whole."""
    plan = hashlib.sha256(json.dumps([repo.ref.id, repo.sha, repo.ref.sub, names]).encode()).hexdigest()
    sub = len(repo.ref.sub) + 1 if repo.ref.sub and repo.ref.sub not in repo.files else 0
    receipt = f"{repo.ref.sub}/{RECEIPT}" if sub else RECEIPT
    theirs = _read(repo, receipt) if receipt in names else {}
    names = [n for n in names if n != receipt]  # ours takes its place
    need = sum(repo.files[n].size for n in names)
    with Output(output, plan=plan, need=need, overwrite=overwrite, files=len(names)) as out:

        def one(name: str, tick: Callable[[int], None]) -> None:
            file = repo.files[name]
            shown = name[sub:] if sub else name.rpartition("/")[2] if repo.ref.sub else name
            if out.done(shown):
                tick(file.size)
                return
            part = out.part(hashlib.sha256(name.encode()).hexdigest()[:16])
            download(repo, name, part, tick)
            tick(0)  # not into a folder that is given up
            out.adopt(part, shown, **({"sha256": file.digest} if file.large else {}))

        many(repo, names, one, progress)
        out.publish(_manifest(repo, theirs))
    return output, out.resumed


def _read(repo: Repo, name: str) -> Any:
    try:
        return load_json(repo.read(name))
    except Corrupt as e:
        warn(f"{quoted(name)} of {repo.ref} is not kept: {e.message}")


def _manifest(repo: Repo, theirs: Any) -> dict[str, Any]:
    """adaptkit.json: what the repository's own says, and where this came from."""
    kept = {k: v for k, v in theirs.items() if k not in ("plan", "files")} if isinstance(theirs, dict) else {}
    return {**kept, "pulled": {"id": str(Ref(repo.ref.id, None, repo.ref.sub)), "revision": repo.sha}}
