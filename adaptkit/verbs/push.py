"""push: a folder to the Hub, in one commit or one pull request."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines import checks
from ..errors import Corrupt, Hub, Mismatch, Unsafe, Usage, quoted, some
from ..formats.base import read
from ..store import journal, safetensors
from ..store.checkpoint import TRAINING, open_checkpoint, read_json, warn
from ..store.destination import ENDING
from ..store.hub import Ref, ref_of, talk
from ..store.hub.choose import ADAPTER, CONFIG
from ..store.hub.fetch import File, digest_of
from ..store.hub.ids import RECEIPT, SCHEME, is_revision, repo_of
from ..store.hub.talking import talking
from ..store.safepaths import inside, open_regular
from . import card as cards
from . import publish
from .publish import Pushed
from .receipt import receipt_of

TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
WEIGHTS = {".safetensors", ".bin", ".gguf", ".onnx", ".npz", ".pt", ".pth"}
NAMED = {CONFIG: "base_model_name_or_path", "config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}
STATE = {"runs", "logs", "wandb", "__pycache__"}
Progress = Callable[[int, int], None]
BLOCK, LONGEST = 8 << 20, 256  # bytes that are searched for a token at a time, and what is kept of them for the next
SMALL = 10 << 20  # bytes that travel in the commit itself, unless the Hub wants them apart


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Push a model or an adapter to the Hub, in one commit or one pull request.

    folder: what a verb wrote, or any model or adapter.      repo: user/name; made when it is new, `private` if so said.
    revision: the branch.    create_pr: propose instead of commit.    message: of the commit.

    A model card is written when there is none. Raises Corrupt, Mismatch or Unsafe for a folder that is not whole or
    holds a token, Hub for what the Hub says; a push that was cut is gone on with by the same command.
    """
    target = repo_of(repo, "REPO")
    if revision and target.revision and revision != target.revision:
        raise Usage(f"{target.revision!r} stands in the id already", where="--revision")
    if revision and not is_revision(revision):
        raise Usage(f"{quoted(revision)!r} is not the name of a branch", where="--revision")
    target = Ref(target.id, revision or target.revision)
    return push_folder(Path(folder), target, Wish(private, create_pr, message), progress)


def writable(repo: str) -> Ref:
    """The repository to push to later. Raises Usage for a name that is none, Hub when no token says who pushes."""
    target = repo_of(repo, "--push")
    _logged_in(target)
    return target


def _logged_in(target: Ref) -> None:
    if not talk.has_token():
        raise Hub("nobody is logged in", where=f"hub: {target}", hint=talk.LOGIN)
    with talking(target):
        talk.retried(lambda: talk.api().whoami())


@dataclass(frozen=True)
class Wish:
    """How something is pushed. description: of the commit, below its message.    tags: for the card, if it is ours."""

    private: bool = False
    create_pr: bool = False
    message: str | None = None
    description: str | None = None
    tags: Sequence[str] = ()


def push_folder(folder: Path, target: Ref, wish: Wish, progress: Progress | None = None) -> Pushed:
    """Check, upload, commit."""
    from huggingface_hub import CommitOperationAdd

    files = sound(folder)
    _logged_in(target)
    there = publish.prepared(target, wish.private, _inputs(folder))
    operations = list(_sent(target, files, wish.create_pr, progress))
    if cards.NAME not in files and cards.NAME not in there.files:
        sums = {op.path_in_repo: op.upload_info.sha256.hex() for op in operations}
        text = cards.card(folder, target.id, sums, tags=wish.tags)
        operations.append(CommitOperationAdd(cards.NAME, text.encode()))
    removed = publish.stale(there, list(files))
    message = wish.message or f"Add {called(folder)}"
    how = {"create_pr": wish.create_pr, "removed": removed, "description": wish.description}
    info = publish.commit(there, operations, message, **how)
    url, sha = publish.answered(info, wish.create_pr)
    if sha == there.sha:
        return Pushed(target.id, url, sha, 0, 0, removed)
    return Pushed(target.id, url, sha, len(operations), sum(p.stat().st_size for p in files.values()), removed)


def _inputs(folder: Path) -> list[str]:
    """Repositories that what lies in a folder was made of."""
    said = receipt_of(folder)
    found = {ref_of(SCHEME + r["id"]).id for r in cards.commits(said)}
    return sorted({*found, cards.base_id(folder, said)} - {None})


def _sent(target: Ref, files: dict[str, Path], create_pr: bool, progress: Progress | None) -> Iterator[Any]:
    """Upload weights, the largest first; small files travel in the commit."""
    from huggingface_hub import CommitOperationAdd

    sizes = {name: path.stat().st_size for name, path in files.items()}
    total, done = sum(sizes.values()), 0
    for name in sorted(files, key=lambda n: -sizes[n]):
        if progress and hasattr(progress, "label"):
            progress.label(f"pushing {name}")
        if files[name].suffix in WEIGHTS or sizes[name] > SMALL:
            yield publish.uploaded(target, name, files[name], create_pr)
        else:
            yield CommitOperationAdd(name, str(files[name]))
        done += sizes[name]
        if progress:
            progress(done, total)


def called(folder: Path) -> str:
    """What a commit calls a folder."""
    verb = cards.made_by(receipt_of(folder))
    kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
    return f"{kind} made by adaptkit {verb}" if verb else kind


# -- what may be pushed


def sound(folder: Path) -> dict[str, Path]:
    """The files to push. Raises for a folder that is half-written, broken, not a model or adapter, or tells too much."""
    if not folder.is_dir():
        raise Usage("is not a folder" if folder.exists() else "not found", where=folder, hint="give what a verb wrote")
    if folder.name.endswith(ENDING) or (folder / journal.NAME).exists():
        raise Corrupt("is half-written", where=folder.name, hint="run the command that writes it again, to its end")
    files = dict(_files(folder))
    _whole(folder, files)
    _as_recorded(folder, files)
    for name, path in files.items():
        _tells_nothing(name, path)
    _names_no_place(folder, files)
    return files


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    left = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "checkpoint-")) and f not in STATE)
        for name in sorted(names):
            path = Path(where, name)
            shown = path.relative_to(folder).as_posix()
            if name.startswith((".", *(t for t in TRAINING if t not in ("adapter_", RECEIPT)))) or name.endswith(
                ".tmp"
            ):
                left += [] if name.startswith(".") else [shown]
            elif path.is_file() or path.is_symlink():
                yield shown, inside(folder, shown)
    if left:
        warn(f"{some(left)} belong to the training and stay here")


def _whole(folder: Path, files: dict[str, Path]) -> None:
    """Headers, index and settings, as far as that costs no time."""
    weights = [n for n in files if Path(n).suffix in WEIGHTS]
    if not weights:
        raise Mismatch("holds no weights", where=folder.name, hint="give the folder of a model or an adapter")
    if "adapter_config.json" in files or any(n in files for n in ADAPTER):
        checks.numbers(read(folder))
    if "config.json" in files and any("/" not in n and _is_checkpoint(n) for n in weights):
        open_checkpoint(folder)
    for name in weights:
        if name.endswith(".safetensors"):
            safetensors.read(files[name])


def _is_checkpoint(name: str) -> bool:
    return not name.startswith("adapter_") and not name.endswith((".onnx", ".gguf", ".npz"))


def _as_recorded(folder: Path, files: dict[str, Path]) -> None:
    """Against adaptkit.json: names, sizes, and the sha256 of small files."""
    if RECEIPT not in files:
        return
    records = read_json(files[RECEIPT]).get("files")
    for name, record in journal.records(records).items():
        if name not in files:
            raise Corrupt(f"names {quoted(name)}, which is not there", where=RECEIPT, hint="make the folder again")
        size = files[name].stat().st_size
        if size != record["size"]:
            words = f"has {size:,} bytes, {RECEIPT} says {record['size']:,}"
            raise Corrupt(words, where=name, hint="make the folder again")
        wanted = str(record.get("sha256", ""))
        if len(wanted) == 64 and size <= SMALL and digest_of(files[name], File(size, wanted)) != wanted:
            raise Corrupt(
                f"was changed after {RECEIPT} was written", where=name, hint=f"delete {RECEIPT} if you meant to"
            )


def _tells_nothing(name: str, path: Path) -> None:
    """Raises Unsafe for a token in anything that is not weights."""
    if path.suffix in WEIGHTS:
        return
    own, end = (talk.own_token() or "").encode(), b""
    with open(open_regular(path), "rb") as stream:
        while block := stream.read(BLOCK):
            seen = end + block
            if TOKEN.search(seen) or (own and own in seen):
                words = "holds what looks like a Hub token (hf_...)"
                raise Unsafe(words, where=name, hint="remove it, and revoke the token")
            end = seen[-LONGEST:]


def _names_no_place(folder: Path, files: dict[str, Path]) -> None:
    """Raises Unsafe when settings or card name the base by a path of this machine: useless to others, and theirs to read."""
    hint = "write the base's Hub id there"
    for name, path in files.items():
        leaf = Path(name).name
        named = str(read_json(path).get(NAMED[leaf]) or "") if leaf in NAMED else ""
        if named and (_is_place(named) if leaf == CONFIG else _is_here(named)):
            raise Unsafe("names its base model by a path of this machine", where=name, hint=hint)
    if (folder / cards.NAME).is_file():
        from huggingface_hub.repocard import metadata_load

        try:
            front = metadata_load(folder / cards.NAME) or {}
        except Exception:  # the Hub checks the front matter itself, and says what is wrong with it
            return
        named = front.get("base_model") or []
        if any(_is_place(str(n)) for n in ([named] if isinstance(named, str) else named)):
            raise Unsafe("names its base model by a path of this machine", where=cards.NAME, hint=hint)


def _is_here(text: str) -> bool:
    return Path(text).is_absolute() and Path(text).exists()


def _is_place(text: str) -> bool:
    return ref_of(SCHEME + text) is None or len(text.split("/")) > 2 or Path(text).exists()
