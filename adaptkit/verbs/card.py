"""The model card of what is pushed: front matter that the Hub reads, and how the model was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import AdaptKitError, quoted
from ..store.checkpoint import read_json, warn
from ..store.hub import Ref, ref_of, talk
from ..store.hub.ids import SCHEME, SHA
from ..store.hub.talking import talking
from .receipt import receipt_of

NAME = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
SHOWN = 10  # tensors, those that changed most
WORDS = {
    "merge": "Adapters merged into their base model",
    "unmerge": "Adapters taken out of a merged model",
    "combine": "Adapters combined into one",
    "resize": "An adapter at another rank",
    "extract": "A LoRA extracted from a fine-tuned model",
    "convert": "A checkpoint in another container",
}


def card(
    folder: Path, repo: str, sums: Mapping[str, str], said: dict[str, Any] | None = None, tags: Sequence[str] = ()
) -> str:
    """README.md for what lies in a folder.

    sums: sha256 of what is pushed.    said: adaptkit.json, read when left out.    tags: more than our own.
    """
    from huggingface_hub import ModelCardData

    said = receipt_of(folder) if said is None else said
    base = base_id(folder, said)
    front = ModelCardData(
        base_model=base,
        library_name=_library(folder),
        tags=["adaptkit", *_tags(folder, said), *tags],
        **inherited(base),
    )
    body = "\n".join(["", f"# {repo.rpartition('/')[2]}", "", *_body(said, base), *_sums(sums)])
    return f"---\n{front.to_yaml()}\n---\n{body}\n"


def base_id(folder: Path, said: dict[str, Any]) -> str | None:
    """The Hub id of the base; None when it is known by a path only."""
    config = folder / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    if named:
        found = ref_of(SCHEME + str(named))
        return found.id if found and not found.sub else None
    named = next((r["id"] for r in commits(said) if r["id"] in (said.get("base"), said.get("source"))), "")
    found = ref_of(SCHEME + named)
    return found.id if found else None


def commits(said: dict[str, Any]) -> list[dict[str, str]]:
    """The Hub inputs that a receipt names, as far as they read like such."""
    return [
        r for r in _rows(said, "hub")
        if ref_of(SCHEME + str(r.get("id"))) and SHA.fullmatch(str(r.get("revision")))
    ]  # fmt: skip


def inherited(base: str | None) -> dict[str, Any]:
    """Licence and languages from the base's card."""
    if not base:
        return {}
    try:
        with talking(Ref(base)):
            data = talk.retried(lambda: talk.api().model_info(base)).card_data
    except AdaptKitError as e:
        warn(f"the card of {base} could not be read ({e.message}): licence and languages are not taken over")
        return {}
    found = data.to_dict() if data else {}
    return {k: found[k] for k in INHERITED if found.get(k)}


def made_by(said: dict[str, Any]) -> str | None:
    """The verb that made a folder."""
    verb = _made(said).get("verb")
    return verb if verb in WORDS else None


def _library(folder: Path) -> str | None:
    if (folder / "modules.json").is_file():
        return "sentence-transformers"
    if (folder / "config.json").is_file():
        return "transformers"
    return "peft" if (folder / "adapter_config.json").is_file() else None


def _tags(folder: Path, said: dict[str, Any]) -> list[str]:
    kind = "adapter" if (folder / "adapter_config.json").is_file() else None
    verb = made_by(said)
    return [t for t in (verb if verb in ("merge", "unmerge") else None, kind) if t]


# -- the text


def _body(said: dict[str, Any], base: str | None) -> Iterator[str]:
    verb, made = made_by(said), _made(said)
    yield f"{WORDS[verb]}, written by AdaptKit {_version(said)}." if verb else f"Pushed by AdaptKit {_version({})}."
    yield from _table(("", "from", "weight"), _inputs(said, base))
    if settings := {k: v for k, v in made.items() if k not in ("verb", "weights")} if verb else {}:
        yield from ("", f"Settings: `{quoted(json.dumps(settings, sort_keys=True))}`")
    if verb and isinstance(said.get("versions"), dict):
        yield from ("", "With " + ", ".join(f"{quoted(k)} {quoted(v)}" for k, v in said["versions"].items()) + ".")
    if said.get("changed"):
        yield from ("", f"{quoted(said['changed'])} tensors changed.{_lost(said)}")
    yield from _folded("Largest changes, Frobenius norm before rounding", ("tensor", "norm"), _norms(said))
    yield from _folded("Checksums of the inputs", ("file", "sha256"), _input_sums(said))


def _version(said: dict[str, Any]) -> str:
    return quoted(said.get("adaptkit") or version("adaptkit"))


def _inputs(said: dict[str, Any], base: str | None) -> Iterator[tuple]:
    at = {r["id"]: r["revision"] for r in commits(said)}
    weights = _made(said).get("weights")
    if base:
        yield "base", _link(base, at), ""
    if said.get("finetuned"):
        yield "fine-tuned", _link(str(said["finetuned"]), at), ""
    for k, name in enumerate(_list(said, "adapters")):
        yield "adapter", _link(str(name), at), weights[k] if isinstance(weights, list) and k < len(weights) else 1


def _link(name: str, at: dict[str, str]) -> str:
    """A name, and the commit when it is the Hub's; a local one without its folders."""
    if name not in at:
        return f"`{quoted(name)}`"
    ref = ref_of(SCHEME + name)
    sub = f"/{ref.sub}" if ref.sub else ""
    return f"[{name}]({talk.endpoint()}/{ref.id}/tree/{at[name]}{sub}) at `{at[name]}`"


def _lost(said: dict[str, Any]) -> str:
    lost = [x for x in _list(said, "lost_to_rounding") if isinstance(x, int | float)]
    return f" Rounding to the stored dtype took {max(lost):.1%} of an update." if any(lost) else ""


def _norms(said: dict[str, Any]) -> list[tuple]:
    norms = said.get("norms") if isinstance(said.get("norms"), dict) else {}
    found = [(n, v) for n, v in norms.items() if isinstance(v, int | float)]
    return [(quoted(n), f"{v:.4g}") for n, v in sorted(found, key=lambda item: -item[1])[:SHOWN]]


def _input_sums(said: dict[str, Any]) -> Iterator[tuple]:
    for given in _rows(said, "inputs"):
        for file in _rows(given, "files"):
            if file.get("sha256"):
                yield quoted(f"{given.get('name')}/{file.get('name')}"), f"`{quoted(file['sha256'])}`"


def _sums(sums: Mapping[str, str]) -> Iterator[str]:
    yield from _table(("file", "sha256"), ((quoted(n), f"`{s}`") for n, s in sorted(sums.items()) if n != NAME))


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A table of Markdown, nothing when it has no rows."""
    lines = [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    if lines:
        yield from ("", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines)


def _folded(title: str, heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    """A table that opens when its title is clicked on."""
    if lines := list(_table(heads, rows)):
        yield from ("", f"<details><summary>{title}</summary>", *lines, "", "</details>")


# -- what a receipt says, whoever wrote it


def _made(said: dict[str, Any]) -> dict[str, Any]:
    return said["made"] if isinstance(said.get("made"), dict) else {}


def _list(said: dict[str, Any], name: str) -> list[Any]:
    return said[name] if isinstance(said.get(name), list) else []


def _rows(said: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [r for r in _list(said, name) if isinstance(r, dict)]
