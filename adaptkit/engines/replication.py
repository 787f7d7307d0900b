"""layer_replication: the adapter was trained on a deeper model, made by repeating spans of the base's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..adapter import Adapter
from ..errors import Mismatch, some
from ..store.entry import Entry

LAYERED = re.compile(r"(?P<head>(?:.*?\.)?(?:layers|h|layer|blocks|block))\.(?P<index>\d+)\.(?P<tail>.+)")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def replicated(
    entries: Mapping[str, Entry], config: dict[str, Any], adapters: Sequence[Adapter]
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries and the config of the deeper model: spans [start, stop) of layers, one after the other."""
    spans = [a.about.get("layer_replication") for a in adapters]
    if not any(spans):
        return dict(entries), config
    if any(s != spans[0] for s in spans):
        raise Mismatch("adapters with different layer_replication cannot be merged together", hint="merge one")
    order = [i for start, stop in spans[0] for i in range(start, stop)]
    return _repeat(entries, order), _deeper(config, len(order))


def _repeat(entries: Mapping[str, Entry], order: list[int]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    layers: dict[int, list[tuple[str, str, Entry]]] = {}
    for name, entry in entries.items():
        if found := LAYERED.fullmatch(name):
            layers.setdefault(int(found["index"]), []).append((found["head"], found["tail"], entry))
        else:
            out[name] = entry
    if missing := sorted(set(order) - layers.keys()):
        raise Mismatch(f"layer_replication names layers {some(missing)}, the model has {len(layers)}")
    if len({head for parts in layers.values() for head, _, _ in parts}) > 1:
        raise Mismatch("layer_replication on a model with several stacks of layers is not defined")
    for new, old in enumerate(order):
        for head, tail, entry in layers[old]:
            name = f"{head}.{new}.{tail}"
            out[name] = replace(entry, name=name)
    return out


def _deeper(config: dict[str, Any], count: int) -> dict[str, Any]:
    key = next((k for k in COUNTS if k in config), COUNTS[0])
    lists = {
        k: v for k, v in config.items() if isinstance(v, list) and len(v) == config.get(key) and k == "layer_types"
    }
    if lists:
        raise Mismatch("layer_replication on a model whose layers differ in type (layer_types) is not supported")
    return {**config, key: count}
