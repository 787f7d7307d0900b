"""The model card of what is pushed: front matter that the Hub reads, and how the model was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import AdaptKitError, quoted
from ..store.checkpoint import read_json, warn
from ..store.hub import Ref, ref_of, talk
from ..store.hub.ids import RECEIPT, SCHEME, SHA

NAME = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
WORDS = {
    "merge": "Adapters merged into their base model",
    "unmerge": "Adapters taken out of a merged model",
}


def card(folder: Path, repo: str, files: dict[str, int], said: dict[str, Any] | None = None) -> str:
    """README.md for what lies in a folder. files: what is pushed, in bytes. said: adaptkit.json, read when left out."""
    from huggingface_hub import ModelCardData

    said = receipt_of(folder) if said is None else said
    base = base_id(folder, said)
    kind = _library(folder)
    front = ModelCardData(
        base_model=base, library_name=kind, tags=["adaptkit", *_tags(folder, said)], **inherited(base)
    )
    return f"---\n{front.to_yaml()}\n---\n\n{_body(repo, said, base, files)}"


def receipt_of(folder: Path) -> dict[str, Any]:
    """adaptkit.json, {} when there is none or it cannot be read."""
    try:
        return read_json(folder / RECEIPT) if (folder / RECEIPT).is_file() else {}
    except AdaptKitError:
        return {}


def base_id(folder: Path, said: dict[str, Any]) -> str | None:
    """The Hub id of the base; None when it is known by a path only."""
    config = folder / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if named:
        found = ref_of(SCHEME + str(named))
        return found.id if found and not found.sub else None
    named = next((r["id"] for r in commits(said) if r["id"] == said.get("base")), "")
    found = ref_of(SCHEME + named)
    return found.id if found else None


def commits(said: dict[str, Any]) -> list[dict[str, str]]:
    """The Hub inputs that a receipt names, as far as they read like such."""
    found = said.get("hub") if isinstance(said.get("hub"), list) else []
    return [
        r for r in found
        if isinstance(r, dict) and ref_of(SCHEME + str(r.get("id"))) and SHA.fullmatch(str(r.get("revision")))
    ]  # fmt: skip


def inherited(base: str | None) -> dict[str, Any]:
    """Licence and languages from the base's card."""
    if not base:
        return {}
    try:
        with talk.talking(Ref(base)):
            data = talk.retried(lambda: talk.api().model_info(base)).card_data
    except AdaptKitError as e:
        warn(f"the card of {base} could not be read ({e.message}): licence and languages are not taken over")
        return {}
    found = data.to_dict() if data else {}
    return {k: found[k] for k in INHERITED if found.get(k)}


def _library(folder: Path) -> str | None:
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if (folder / "config.json").is_file():
        return "transformers"
    return "peft" if (folder / "adapter_config.json").is_file() else None


def _tags(folder: Path, said: dict[str, Any]) -> list[str]:
    verb = (said.get("made") or {}).get("verb") if isinstance(said.get("made"), dict) else None
    kind = "adapter" if (folder / "adapter_config.json").is_file() else None
    return [t for t in (verb if verb in WORDS else None, kind) if t]


def _body(repo: str, said: dict[str, Any], base: str | None, files: dict[str, int]) -> str:
    made = said.get("made") if isinstance(said.get("made"), dict) else {}
    version = quoted(said.get("adaptkit") or "")
    what = WORDS.get(str(made.get("verb")), "Files")
    lines = [f"# {repo.rpartition('/')[2]}", "", f"{what}, written by AdaptKit {version}".strip() + "."]
    lines += _inputs(said, base, made)
    if settings := {k: v for k, v in made.items() if k not in ("verb", "weights")}:
        lines += ["", f"Settings: `{quoted(json.dumps(settings, sort_keys=True))}`"]
    if said.get("changed"):
        lines += ["", f"{said['changed']} tensors changed." + _lost(said)]
    return "\n".join([*lines, *_sums(said, files)]) + "\n"


def _inputs(said: dict[str, Any], base: str | None, made: dict[str, Any]) -> list[str]:
    at = {r["id"]: r["revision"] for r in commits(said)}
    adapters = said.get("adapters") if isinstance(said.get("adapters"), list) else []
    weights = made.get("weights") if isinstance(made.get("weights"), list) else []
    rows = [f"| base | {_link(base, at)} | |"] if base else []
    for k, name in enumerate(adapters):
        rows.append(f"| adapter | {_link(str(name), at)} | {weights[k] if k < len(weights) else 1} |")
    return ["", "| | from | weight |", "|---|---|---|", *rows] if rows else []


def _link(name: str, at: dict[str, str]) -> str:
    """A name, and the commit when it is the Hub's; a local one without its folders."""
    if name in at:
        return f"[{name}](https://huggingface.co/{name}) at `{at[name]}`"
    return f"`{quoted(name)}`"


def _lost(said: dict[str, Any]) -> str:
    lost = [x for x in said.get("lost_to_rounding") or [] if isinstance(x, int | float)]
    return f" Rounding to the stored dtype took {max(lost):.1%} of an update." if any(lost) else ""


def _sums(said: dict[str, Any], files: dict[str, int]) -> list[str]:
    found = said.get("files") if isinstance(said.get("files"), list) else []
    sums = {r["name"]: r["sha256"] for r in found if isinstance(r, dict) and "sha256" in r and r.get("name") in files}
    if not sums:
        return []
    return [
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| {quoted(n)} | `{quoted(s)}` |" for n, s in sorted(sums.items())),
    ]
