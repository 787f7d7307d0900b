"""One commit at the Hub: weights first, then everything at once, and knowing whether it arrived."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Hub, quoted
from ..store.checkpoint import warn
from ..store.hub import Ref, talk
from ..store.hub.fetch import File, Repo, repo_at
from ..store.hub.talking import talking

WEIGHTS = re.compile(r"(?:model|pytorch_model|adapter_model)[^/]*\.(?:safetensors|bin)(?:\.index\.json)?")


@dataclass
class Pushed:
    """What a push did.

    id: of the repository.   url: of the commit or the pull request.   revision: the commit.
    files, bytes: that were pushed; both are 0 when all was there already.    removed: weight files of an older model that the same commit deletes.
    """

    id: str
    url: str
    revision: str
    files: int
    bytes: int
    removed: list[str] = field(default_factory=list)


def prepared(target: Ref, private: bool, inputs: Sequence[str] = ()) -> Repo:
    """The repository to push to, made when it is new, its branch too; as it is now. Raises Hub.

    inputs: ids of what went into the model; when one of them is private, a new repository is, too.
    """
    client = talk.api()
    with talking(target):
        private = private or _made_of_secrets(target, inputs)
        talk.retried(lambda: client.create_repo(target.id, private=private or None, exist_ok=True))
        if target.revision and not target.revision.startswith("refs/"):
            talk.retried(lambda: client.create_branch(target.id, branch=target.revision, exist_ok=True))
    return repo_at(target)


def _made_of_secrets(target: Ref, inputs: Sequence[str]) -> bool:
    """Whether a repository is new, and something private goes into it; said, too."""
    secret = next((i for i in inputs if _is_private(i)), None)
    if secret is None or talk.retried(lambda: talk.api().repo_exists(target.id)):
        return False
    warn(f"{secret} is private, so the new {target.id} is, too; its settings at the Hub change that")
    return True


def _is_private(id: str) -> bool:
    try:
        return bool(talk.retried(lambda: talk.api().model_info(id)).private)
    except Exception:  # what cannot be seen any more cannot be told
        return False


def uploaded(target: Ref, name: str, source: str | Path | bytes, create_pr: bool = False) -> Any:
    """Upload one file so that a commit can name it; nothing to see before that. Returns the client's operation.

    What the Hub has already, by its hash, is not sent again.
    """
    from huggingface_hub import CommitOperationAdd

    client = talk.api()
    with talking(target):
        op = CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
        how = {"revision": target.revision, "create_pr": create_pr or None, "free_memory": False}
        talk.retried(lambda: client.preupload_lfs_files(target.id, additions=[op], **how))
    return op


def known_upload(name: str, file: File) -> Any:
    """The operation for a file that the Hub has, and this machine no longer."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    op = CommitOperationAdd(name, b"")
    op.upload_info = UploadInfo(size=file.size, sample=b"", sha256=bytes.fromhex(file.digest))
    op._upload_mode, op._is_uploaded = "lfs", True  # the client has no other way to say so across two runs
    op._should_ignore = False
    return op


def still_there(target: Ref, files: Sequence[File]) -> set[str]:
    """Which uploads, by hash, the Hub still has: those that no commit names may be swept."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    found: set[str] = set()
    how = {"repo_type": "model", "repo_id": target.id, "revision": target.revision}
    with talking(target):
        for at in range(0, len(files), 256):
            infos = [UploadInfo(size=f.size, sample=b"", sha256=bytes.fromhex(f.digest)) for f in files[at : at + 256]]
            said = talk.retried(lambda infos=infos: post_lfs_batch_info(infos, None, **how, headers=talk.headers()))
            found |= {a["oid"] for a in said[0] if not a.get("actions")}
    return found


def stale(there: Repo, names: Sequence[str]) -> list[str]:
    """Weight files of an older model, which would make the new one ambiguous."""
    new = any(WEIGHTS.fullmatch(n) for n in names)
    return sorted(n for n in there.files if new and WEIGHTS.fullmatch(n) and n not in names)


def commit(
    there: Repo,
    operations: list[Any],
    message: str,
    *,
    create_pr: bool = False,
    removed: Sequence[str] = (),
    description: str | None = None,
) -> Any:
    """Make everything visible in one commit. Raises Hub; a commit whose answer was lost is found and not sent twice."""
    from huggingface_hub import CommitOperationDelete

    target, client = there.ref, talk.api()
    operations = [*operations, *(CommitOperationDelete(n) for n in removed)]
    parent = None if create_pr else there.sha
    how = {
        "revision": target.revision,
        "commit_message": message,
        "commit_description": description,
        "parent_commit": parent,
        "create_pr": create_pr or None,
    }

    def once() -> Any:
        return client.create_commit(target.id, operations, **how)

    with talking(target):
        return _insist(once, lambda: _landed(there, operations, removed), create_pr)


def _insist(once: Callable[[], Any], landed: Callable[[], Any], create_pr: bool) -> Any:
    """Commit until it is known to be done or refused. landed: looks for the commit when the answer was lost."""
    for k in range(talk.TRIES):
        try:
            return once()
        except Exception as e:
            status = talk.status_of(e)
            garbled = not status and isinstance(e, ValueError | KeyError)
            if not (talk.passing(e) or garbled or status == 412):
                raise
            if create_pr and (not status or status >= 500):
                hint = "look at its pull requests before you push again"
                raise Hub("no answer to the pull request, which may be there all the same", hint=hint) from e
            if found := None if create_pr else landed():
                return found
            if garbled or status == 412 or k == talk.TRIES - 1:
                raise
            talk.pause(e, k)
    raise AssertionError("unreachable")


def _landed(there: Repo, operations: list[Any], removed: Sequence[str]) -> Any:
    """The commit whose answer was lost, None when it is not there."""
    from huggingface_hub import CommitInfo, CommitOperationAdd

    now = repo_at(there.ref)
    if now.sha == there.sha or any(n in now.files for n in removed):
        return None
    for op in operations:
        if (
            isinstance(op, CommitOperationAdd)
            and getattr(now.files.get(op.path_in_repo), "digest", None) != op._local_oid
        ):
            return None
    warn(f"hub: {there.ref}: no answer to the commit, but it is at {now.sha[:7]} with all files: push done")
    url = f"{talk.endpoint()}/{there.ref.id}/commit/{now.sha}"
    return CommitInfo(commit_url=url, commit_message="", commit_description="", oid=now.sha)


def answered(info: Any, create_pr: bool) -> tuple[str, str]:
    """URL and commit of an answer."""
    if not getattr(info, "oid", None):
        raise Hub(f"gave no commit ({quoted(info)})")
    return str((create_pr and info.pr_url) or info.commit_url), info.oid  # without a change there is no pull request
