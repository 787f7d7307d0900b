"""What a careful person would look at before merging: the settings against the tensors, on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..adapter import Adapter, Site
from ..errors import Corrupt, Mismatch, Unsafe, quoted, some
from ..select import Select
from ..store.arrays import FLOATS, load
from ..store.checkpoint import Checkpoint, warn
from ..store.entry import Entry
from ..tuners.base import Tuner
from .plan import Target


def config(checkpoint: Checkpoint) -> None:
    """config.json against the tensors. Raises Unsafe for a setting that would run code when the model is loaded."""
    found = checkpoint.config
    if found.get("trust_remote_code"):
        raise Unsafe(
            "sets trust_remote_code, which would run code when the model is loaded",
            where="config.json",
            hint="remove it",
        )
    if found.get("_attn_implementation_internal"):
        warn("config.json sets _attn_implementation_internal, which names code to fetch; copied, never followed")
    if found.get("auto_map"):
        warn("config.json names code of its own (auto_map); the files are copied, never run")
    _sizes(checkpoint, found)


def _sizes(checkpoint: Checkpoint, found: dict[str, Any]) -> None:
    text = found.get("text_config") if isinstance(found.get("text_config"), dict) else found
    embedding = next(
        (e for n, e in checkpoint.entries.items() if n.endswith("embed_tokens.weight") and len(e.shape) == 2), None
    )
    if embedding is not None:
        for key, size in (("vocab_size", embedding.shape[0]), ("hidden_size", embedding.shape[1])):
            if isinstance(text.get(key), int) and text[key] != size:
                warn(f"config.json says {key} {text[key]:,}, {quoted(embedding.name)} has {size:,}")
    layers = {n.split(".layers.")[1].split(".")[0] for n in checkpoint.entries if n.count(".layers.") == 1}
    count = text.get("num_hidden_layers")
    if layers and isinstance(count, int) and count != len(layers) and not text.get("num_nextn_predict_layers"):
        warn(f"config.json says num_hidden_layers {count:,}, the weights have {len(layers)}")


def main_dtype(entries: dict[str, Entry]) -> str:
    """The dtype that most of the model's numbers have."""
    sizes: Counter[str] = Counter()
    for e in entries.values():
        sizes[e.dtype] += e.numel if e.dtype in FLOATS else 0
    return sizes.most_common(1)[0][0]


def saved_modules(adapter: Adapter, names: list[str]) -> None:
    """Raises Mismatch when modules_to_save names a module of the model whose tensors the adapter lacks."""
    modules = {n.rpartition(".")[0] for n in names}
    have = [f".{n.rpartition('.')[0]}." for n in adapter.whole]
    implied = adapter.about.get("implied_heads") or ()
    for wanted in [w for w in adapter.about.get("modules_to_save") or () if w not in implied]:
        mine = [m for m in modules if wanted and (m == wanted or m.endswith(f".{wanted}"))]
        if mine and not any(f".{wanted}." in h for h in have):
            raise Mismatch(
                f"modules_to_save names {quoted(wanted)}, but the file lacks its tensors", hint="fetch it again"
            )


def coverage(adapter: Adapter, tensors: Mapping[str, Target]) -> None:
    """Warn when the settings aim at modules for which the file holds nothing."""
    about = adapter.about
    targets = about.get("target_modules")
    if not isinstance(targets, list) or not adapter.sites or "" in adapter.sites:
        return
    layers = about.get("layers_to_transform")
    chosen = Select(
        names=[t for t in targets if t] or ["-"],
        layers=[layers] if isinstance(layers, int) else layers,
        layers_pattern=about.get("layers_pattern"),
        exclude=about.get("exclude_modules"),
    )
    modules = {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}
    silent = [m for m in chosen.hits(modules) if not (modules[m].changes or modules[m].replaced)]
    if silent:
        it = "it" if len(silent) == 1 else "them"
        warn(f"target_modules covers {some(silent)}, but the adapter holds nothing for {it}")
    if ghosts := [t for t in targets if t and not any(s == t or s.endswith(f".{t}") for s in adapter.sites)]:
        warn(f"target_modules names {some(sorted(ghosts))}, which the adapter holds nothing for")


IDLE = "every update of the adapter is zero: the output equals the base model"


def numbers(adapter: Adapter, idle_text: str = IDLE) -> None:
    """Read every number of an adapter once. Raises Corrupt for NaN or infinity, warns when nothing would change."""
    idle = bool(adapter.sites) and not adapter.whole
    for path, site in adapter.sites.items():
        arrays = {letter: _finite(value, f"{path}.{letter}") for letter, value in site.params.items()}
        idle = idle and not _acts(site, arrays)
    for name, value in adapter.whole.items():
        _finite(value, name)
    if idle:
        warn(idle_text)


def _finite(value: Any, name: str) -> np.ndarray:
    array = load(value)
    if array.dtype.kind in "iub":
        return array
    bad = array.size - int(np.isfinite(array.astype("f4", copy=False)).sum())
    if bad:
        name = value.name if isinstance(value, Entry) else name
        raise Corrupt(f"{quoted(name)}: {bad:,} of {array.size:,} values are NaN or infinite", hint="train it again")
    return array


def _acts(site: Site, arrays: dict[str, np.ndarray]) -> bool:
    """Whether a site changes anything; only B A can be seen to be nothing without the base."""
    if type(site.tuner).factors is Tuner.factors or "B" not in arrays:
        return True
    return (getattr(site.tuner, "alpha", 1.0) != 0 and bool(arrays["B"].any() and arrays["A"].any())) or "c" in arrays
