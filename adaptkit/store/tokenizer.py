"""A tokenizer that puts virtual tokens in front: new added tokens, and a post-processor that begins with them.

The tokenizer is taken as transformers loads it, which may differ from what tokenizer.json says, and written so that
the plain class PreTrainedTokenizerFast, which changes nothing, loads it again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Corrupt, Mismatch, quoted
from .safepaths import read_small

PIECE = "<|adaptkit_prompt|>"  # names all virtual tokens at once in the post-processor's template
TOKEN = "<|adaptkit_prompt_{}|>"
FILLER = "<|adaptkit_unused_{}|>"
SAMPLE = "Ab 1"
FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()
KEPT = ("special_tokens_map.json",)
TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass
class Loaded:
    """A tokenizer as transformers runs it.

    state: the content of a tokenizer.json.    settings: what its Python class says, for tokenizer_config.json.
    """

    folder: Path
    state: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """One more than the highest id."""
        vocab = self.state["model"].get("vocab") or {}
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        return 1 + max([*ids, *(t["id"] for t in self.state["added_tokens"])], default=-1)


def folder_of(extras: Iterable[tuple[Path, str]]) -> Path | None:
    """The folder of the tokenizer among the files beside the weights, None when there is none."""
    found = {name: file for file, name in extras if name in FILES}
    first = next(
        (n for n in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") if n in found),
        None,
    )
    return found[first].parent if first else None


def loaded(folder: Path, config: dict[str, Any]) -> Loaded:
    """The tokenizer of a folder. Raises Mismatch when transformers cannot load it without foreign code."""
    try:
        found = _load(folder)
        state = json.loads(found.backend_tokenizer.to_str())
    except Exception as e:
        reason = str(e).splitlines()[0][:150] if str(e) else type(e).__name__
        raise Mismatch(
            f"the tokenizer cannot be loaded, so it cannot put virtual tokens in front ({quoted(reason)})",
            where=folder.name,
            hint="save it with a tokenizer.json",
        ) from e
    if any(t["content"].startswith(TOKEN.partition("{")[0]) for t in state["added_tokens"]):
        raise Mismatch("the model already carries a soft prompt", where=folder.name, hint="start from its base")
    return Loaded(folder, state, _settings(found))


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)


def _settings(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer's class decides and PreTrainedTokenizerFast would decide otherwise."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        **{k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
    }


def with_prompt(tokenizer: Loaded, first: int, count: int) -> dict[str, bytes]:
    """The files of the tokenizer that puts ids first to first + count - 1 before everything, by name.

    Ids below `first` that no token has get one that no text contains. Raises Mismatch when the result does not do it.
    """
    state = json.loads(json.dumps(tokenizer.state))
    tokens = [TOKEN.format(i) for i in range(count)]
    state["added_tokens"] += [_added(FILLER.format(i), i) for i in range(tokenizer.size, first)]
    state["added_tokens"] += [_added(text, first + i) for i, text in enumerate(tokens)]
    ids = list(range(first, first + count))
    state["post_processor"] = _in_front(state.get("post_processor"), ids, tokens)
    _check(tokenizer, state, ids, tokens)
    files = {"tokenizer.json": _json(state)}
    files["tokenizer_config.json"] = _json(_config(tokenizer, state, "".join(tokens)))
    return files | _templates(tokenizer.folder, "".join(tokens))


def _added(text: str, at: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": at, "content": text, **flags, "special": True}


def _check(tokenizer: Loaded, state: dict[str, Any], ids: list[int], tokens: list[str]) -> None:
    """Ask the library that will run it."""
    from tokenizers import Tokenizer

    try:
        before, after = (Tokenizer.from_str(json.dumps(s)) for s in (tokenizer.state, state))
    except Exception as e:
        raise Mismatch(f"the tokenizer cannot take virtual tokens ({quoted(e)})", where="tokenizer.json") from e
    if [after.token_to_id(t) for t in tokens] != ids:
        got = after.token_to_id(tokens[0])
        text = f"the first virtual token would get id {got}, row {ids[0]} holds it"
        raise Mismatch(text, where="tokenizer.json", hint="save the tokenizer again, its ids have holes")
    for pair in (None, SAMPLE):
        if after.encode(SAMPLE, pair).ids != ids + before.encode(SAMPLE, pair).ids:
            raise Mismatch("its post-processor does not put virtual tokens in front", where="tokenizer.json")


# -- the post-processor


def _in_front(old: dict[str, Any] | None, ids: list[int], tokens: list[str]) -> dict[str, Any]:
    """A post-processor that does what `old` does, with the virtual tokens before it."""
    kind = (old or {}).get("type")
    if kind == "TemplateProcessing":
        return _prefixed(old, ids, tokens)
    if kind == "Sequence":
        parts = list(old["processors"])
        at = next((i for i, p in enumerate(parts) if p["type"] != "ByteLevel"), None)
        if at is None:
            return {**old, "processors": [*parts, _in_front(None, ids, tokens)]}
        return {**old, "processors": [*parts[:at], _in_front(parts[at], ids, tokens), *parts[at + 1 :]]}
    if kind == "ByteLevel":
        return {"type": "Sequence", "processors": [old, _in_front(None, ids, tokens)]}
    if kind is None:
        plain = {"type": "TemplateProcessing", "single": [_text("A", 0)], "special_tokens": {}}
        return _prefixed({**plain, "pair": [_text("A", 0), _text("B", 1)]}, ids, tokens)
    raise Mismatch(
        f"has a post-processor of type {quoted(kind)}, which cannot begin with virtual tokens", where="tokenizer.json"
    )


def _prefixed(template: dict[str, Any], ids: list[int], tokens: list[str]) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": PIECE, "type_id": 0}}
    known = {**template["special_tokens"], PIECE: {"id": PIECE, "ids": ids, "tokens": tokens}}
    return {
        **template,
        "single": [piece, *template["single"]],
        "pair": [piece, *template["pair"]],
        "special_tokens": dict(sorted(known.items())),
    }


def _text(which: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": which, "type_id": kind}}


# -- the files beside tokenizer.json


def _config(tokenizer: Loaded, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """tokenizer_config.json: the old one, with what decides how the new tokenizer is loaded."""
    old = _read(tokenizer.folder / "tokenizer_config.json")
    # these make transformers build a post-processor of its own, without the virtual tokens
    new = {k: v for k, v in old.items() if k not in ("add_bos_token", "add_eos_token", "auto_map", "tokenizer_file")}
    new |= tokenizer.settings
    if isinstance(old.get("added_tokens_decoder"), dict):
        fresh = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in state["added_tokens"]}
        new["added_tokens_decoder"] = {**fresh, **old["added_tokens_decoder"]}
    if "chat_template" in old:
        new["chat_template"] = _prefixed_template(old["chat_template"], prefix)
    return new


def _prefixed_template(template: Any, prefix: str) -> Any:
    """A chat template, or a list of named ones, that begins with the virtual tokens."""
    if isinstance(template, str):
        return prefix + template
    if isinstance(template, list):
        return [{**t, "template": prefix + t["template"]} if isinstance(t, dict) else t for t in template]
    if isinstance(template, dict):
        return {k: prefix + v for k, v in template.items()}
    return template


def _templates(folder: Path, prefix: str) -> dict[str, bytes]:
    files = {}
    if (folder / "chat_template.jinja").is_file():
        files["chat_template.jinja"] = prefix.encode() + read_small(folder / "chat_template.jinja")
    if (folder / "chat_template.json").is_file():
        old = _read(folder / "chat_template.json")
        files["chat_template.json"] = _json({k: _prefixed_template(v, prefix) for k, v in old.items()})
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        files[f"additional_chat_templates/{file.name}"] = prefix.encode() + read_small(file)
    return files


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_small(file))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Corrupt("is not a JSON object", where=file.name)
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
