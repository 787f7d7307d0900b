"""Which files of a repository matter: config, one kind of weights, tokenizer. By names and sizes alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from ...errors import Corrupt, Mismatch, quoted, some
from ..checkpoint import LARGEST_EXTRA, LARGEST_JSON, OTHER_ROUTES, SINGLE, TRAINING, belongs
from .ids import RECEIPT

CONFIG = "adapter_config.json"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
PICKLES = (".bin", ".pt", ".pth")
INDEX = ".index.json"
Read = Callable[[str], bytes]


def chosen(sizes: Mapping[str, int], kind: str, read: Read) -> list[str]:
    """The files to fetch, those beside the weights first.

    sizes: of every file, in bytes.   kind: "model" or "adapter", what is wanted, or "any".   read: a small file's bytes.
    Raises Mismatch when it is the other kind, Corrupt when an index promises what is not there.
    """
    adapter = [CONFIG] * (CONFIG in sizes) + [n for n in ADAPTER if n in sizes][:1]
    model = "config.json" in sizes
    if kind == "adapter" and model and not adapter and weights(sizes, read):
        raise Mismatch("this is a model, not an adapter", hint="give the base model first, then the adapter")
    receipt = [RECEIPT] if sizes.get(RECEIPT, LARGEST_JSON) < LARGEST_JSON else []  # verify reads it
    if adapter and (kind == "adapter" or not model):
        return [*receipt, *beside(sizes, read), *adapter]
    if not (found := weights(sizes, read)) and not adapter:
        receipt = []
    return list(dict.fromkeys([*receipt, *beside(sizes, read), *(adapter if kind == "any" else []), *found]))


def weights(sizes: Mapping[str, int], read: Read) -> list[str]:
    """The weight files and their index: safetensors when there are any, otherwise PyTorch's; never both."""
    here = [n for n in sizes if "/" not in n and not n.startswith((".", *TRAINING))]
    for single in SINGLE:
        if single + INDEX in here:
            return _sharded(single + INDEX, sizes, read)
        if single in here:
            return [single]
    if index := sorted(n for n in here if n.endswith(".safetensors" + INDEX)):
        return _sharded(index[0], sizes, read)
    found = [n for n in here if n.endswith(".safetensors")] or [n for n in here if n.endswith(PICKLES)]
    return found if len(found) == 1 else []


def _sharded(index: str, sizes: Mapping[str, int], read: Read) -> list[str]:
    try:
        named = json.loads(read(index))["weight_map"].values()
        shards = sorted({str(n) for n in named})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Corrupt("has no weight_map from tensor names to file names", where=index) from None
    if missing := [n for n in shards if n not in sizes]:
        raise Corrupt(f"promises {some(missing)}, which the repository lacks", where=index)
    return [index, *shards]


def beside(sizes: Mapping[str, int], read: Read) -> list[str]:
    """What else the model needs: the files that merging would copy."""
    parts = _parts(read) if "modules.json" in sizes else set()
    found = []
    for name, size in sizes.items():
        folder, _, leaf = name.rpartition("/")
        if "/" in folder or folder.startswith(".") or folder in OTHER_ROUTES:
            continue
        if (belongs(leaf) and size <= LARGEST_EXTRA) or (folder in parts and folder and leaf in SINGLE):
            found.append(name)
    return sorted(found)


def _parts(read: Read) -> set[str]:
    try:
        return {str(part.get("path")) for part in json.loads(read("modules.json"))}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return set()


def below(files: Mapping[str, Any], sub: str) -> dict[str, Any]:
    """The files of a subfolder by their names in it; a subfolder that is a file is that file alone."""
    if not sub:
        return dict(files)
    if sub in files:
        return {PurePosixPath(sub).name: files[sub]}
    return {n.removeprefix(f"{sub}/"): f for n, f in files.items() if n.startswith(f"{sub}/")}


def folders_with(files: Collection[str], name: str) -> str:
    """Folders that hold a file of this name, for a hint."""
    return some(sorted({quoted(n.rpartition("/")[0]) for n in files if n.endswith(f"/{name}")}))
