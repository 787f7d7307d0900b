"""A plan that changes nothing but the container: the same tensors in other files, in another dtype if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import Mismatch
from ..store.arrays import WORDS
from ..store.checkpoint import Checkpoint, beside, read_json, stamps
from ..store.entry import Entry
from ..store.quantised import refuse_quantised
from .containers import Container, arranged
from .ends import EMBEDDINGS, HEADS
from .plan import Plan, Target, target

SHARD = 5_000_000_000  # bytes of one file, where the source's files are those of a training run


def copied(
    checkpoint: Checkpoint, container: Container, dtype: str | None, limit: int | None, base: Path | None = None
) -> tuple[Plan, list[tuple[str, str, str]]]:
    """The plan, and (what, where, why) of names that were dropped or kept twice.

    base: the folder with config.json and the tokenizer, for shards that have none beside them.
    Raises Mismatch when --dtype is asked of a quantised checkpoint.
    """
    config = settings(checkpoint, base)
    if dtype:
        _refuse_requantising(checkpoint, config)
    entries, aliases, notes = _named(checkpoint, config, container)
    targets = [target(name, e, WORDS.get(dtype or "")) for name, e in entries.items()]
    if limit is None and checkpoint.shards:
        limit = SHARD
    files = arranged(checkpoint, targets, container, limit)
    changed = {**config, "dtype" if "dtype" in config else "torch_dtype": dtype} if dtype and config else None
    extras = _extras(checkpoint, base)
    plan = Plan(checkpoint, files, changed if changed != config else None, extras, aliases=aliases)
    plan.metadata = {name: _metadata(checkpoint, held, container) for name, held in files.items()}
    plan.stamps = stamps([*checkpoint.files, *(file for file, _ in extras)])
    return plan, notes


def settings(checkpoint: Checkpoint, base: Path | None = None) -> dict[str, Any]:
    """config.json, {} where there is none."""
    folders = [checkpoint.root, *([base] if base else [])]
    found = next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)
    return read_json(found) if found else {}


def _refuse_requantising(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    checkpoint.__dict__["config"] = config  # a folder without config.json is no mistake here
    try:
        refuse_quantised(checkpoint)
    except Mismatch as e:
        raise Mismatch(e.message.replace("the base is", "is"), where=e.where, hint="leave --dtype out") from None


Notes = list[tuple[str, str, str]]


def _named(
    checkpoint: Checkpoint, config: dict[str, Any], container: Container
) -> tuple[dict[str, Entry], dict[str, str], Notes]:
    """The tensors to write, the further names of some, and what was done to names.

    PyTorch files hold one tensor under several names. safetensors cannot: the second name is left out where config.json
    says that the model ties the two, and written out elsewhere, so that loading by name finds it.
    """
    twins = _twins(checkpoint.entries)
    noted = {a: k for a, k in _said(checkpoint).items() if k in checkpoint.entries and a not in checkpoint.entries}
    kept = {name: e for name, e in checkpoint.entries.items() if name not in twins}
    if container.name == "pytorch":
        return kept, twins | noted, [("kept", alias, f"shares its storage with {k}") for alias, k in twins.items()]
    tied = any(c.get("tie_word_embeddings") is True for c in (config, config.get("text_config")) if isinstance(c, dict))
    dropped = {a: k for a, k in twins.items() if tied and _is_end(a) and _is_end(k)}
    notes = [("dropped", a, f"is {k}: config.json ties them, and the model will") for a, k in dropped.items()]
    notes += [("kept", a, f"was one storage with {k}; written out") for a, k in twins.items() if a not in dropped]
    return {n: e for n, e in checkpoint.entries.items() if n not in dropped}, {}, notes


def _twins(entries: dict[str, Entry]) -> dict[str, str]:
    """Names of the very same numbers: {further name: the one to keep}, the input embedding or else the first."""
    groups: dict[tuple, list[str]] = {}
    for name, e in entries.items():
        if e.nbytes:
            groups.setdefault((e.file, e.offset, e.shape, e.dtype, e.strides, e.packed, e.parts), []).append(name)
    found = {}
    for names in groups.values():
        keep = next((n for n in names if _leaf(n) in EMBEDDINGS), names[0])
        found |= {n: keep for n in names if n != keep}
    return found


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_end(name: str) -> bool:
    return name.endswith(".weight") and _leaf(name) in (*EMBEDDINGS, *HEADS, "decoder", "output")


def _said(checkpoint: Checkpoint) -> dict[str, str]:
    return {k: v for said in checkpoint.metadata.values() for k, v in said.items()}


def _metadata(checkpoint: Checkpoint, held: list[Target], container: Container) -> dict[str, str]:
    """What a safetensors file says of itself: what the source's said, less what was of its shards."""
    if container.name != "safetensors":
        return {}
    mine = {t.name for t in held}
    said = {k: v for k, v in _said(checkpoint).items() if not k.startswith("DCP_")}
    said = {k: v for k, v in said.items() if v in mine or v not in checkpoint.entries}
    return {**said, "format": said.get("format", "pt")}


def _extras(checkpoint: Checkpoint, base: Path | None) -> list[tuple[Path, str]]:
    found = {name: file for file, name in checkpoint.extras()}
    if (settings_file := checkpoint.root / "adapter_config.json").is_file():
        found["adapter_config.json"] = settings_file
    if base is not None and base.is_dir():
        found = {name: file for file, name in beside(base)} | found
    return [(file, name) for name, file in sorted(found.items())]
