"""push_to_hub: what save_pretrained writes, checked and sent as `adaptkit push` does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..store.hub import Ref, talk
from ..store.hub.ids import repo_of
from ..store.hub.talking import talking
from ..verbs.push import Wish, push_folder


def pushed(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | None = None,
) -> str:
    """Push the adapters of a PeftModel in one commit; its URL. Parameters are transformers'; an adapter has no shards.

    repo_id: user/name, or the name alone of one's own. Raises as `push` does: a base that is a folder of this machine
    is refused, since nobody else could load it.
    """
    with talk.using(token), tempfile.TemporaryDirectory(prefix="adaptkit-") as top:
        target = repo_of(repo_id if "/" in repo_id else f"{_me()}/{repo_id}", "repo_id")
        target = Ref(target.id, revision or target.revision)
        folder = Path(top, target.id.rpartition("/")[2])
        model.save_pretrained(folder)
        wish = Wish(bool(private), create_pr, commit_message, commit_description, tags or ())
        return push_folder(folder, target, wish).url


def _me() -> str:
    with talking("you"):
        return talk.retried(lambda: talk.api().whoami())["name"]
