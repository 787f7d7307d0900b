"""Writing PEFT adapters: one kind of tuner per folder, exact module paths, patterns where sites differ.

Numbers keep the dtype they are stored in, if PEFT reads it and no other is asked for; others are written as float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter, Site
from ...errors import Mismatch, quoted, some
from ...store.arrays import FLOATS, NUMPY, load
from ...store.entry import Entry
from ..base import Note
from ..cast import narrowed
from ..fold import WORDS, chosen, kinds
from ..save import by_width, folder
from . import nested
from .build import EMBEDDINGS, VIRTUAL
from .config import COMMON, SCHEMAS
from .keys import ALONE, PREFIX
from .patterns import exactly

LORAS = ("lora", "dora", "pissa", "olora")
STORED = {NUMPY[dtype]: dtype for dtype in FLOATS}
Tensors = dict[str, np.ndarray]


def write(
    adapter: Adapter, path: Path, *, drop: Collection[str] = (), dtype: str | None = None, **how: Any
) -> list[Note]:
    """Write a folder with adapter_config.json and adapter_model.safetensors that appears whole.

    drop: kinds of parts to leave out.
    dtype: of the factors, as safetensors spells it; tensors replaced outright keep theirs.
    how: overwrite, inputs, beside and said, as `save.folder` takes them.
    Raises Mismatch for what PEFT's format cannot hold, Usage when the folder is not empty.
    """
    adapter, notes = _kept(adapter, drop)
    kind = _kind(adapter)
    config, tensors = {"LORA": _lora, "IA3": _ia3, "TOKENS": _tokens}.get(kind, _virtual)(adapter)
    if dtype is not None:
        tensors = {n: narrowed(v, dtype, n)[0] for n, v in tensors.items()}
    prefix = ALONE if kind == "VIRTUAL" else PREFIX
    for name, value in adapter.whole.items():
        kept = isinstance(value, Entry) and value.dtype in FLOATS
        tensors[prefix + _whole_name(name, adapter)] = value if kept else _array(value)
    modules = sorted({n.rpartition(".")[0] for n in adapter.whole if _is_saved(n, adapter)})
    config |= {"modules_to_save": modules or None, "base_model_name_or_path": adapter.meta.get("base") or None}
    if any(_is_bias(n, adapter) for n in adapter.whole):
        config["bias"] = adapter.about["bias"]
    config |= {"inference_mode": True, "task_type": adapter.about.get("task_type")}
    if revision := adapter.about.get("revision"):
        config["revision"] = revision
    folder(path, "adapter_model.safetensors", by_width(tensors), {"format": "pt"}, config, by="peft", **how)
    return notes


def _kept(adapter: Adapter, drop: Collection[str]) -> tuple[Adapter, list[Note]]:
    """What is left after dropping, with one spelling of the scale for all sites."""
    notes: list[Note] = []
    sites, whole = dict(adapter.sites), dict(adapter.whole)
    if drop:
        held = set(WORDS) | {k for s in sites.values() for k in kinds(s)}
        sites, whole, notes = chosen(adapter, "peft", held - set(drop), drop)
    if len({s.tuner.rslora for s in sites.values() if s.tuner.name in LORAS}) > 1:
        for path, site in sites.items():
            if site.tuner.name in LORAS and site.tuner.rslora:
                alpha = site.tuner.scale * site.tuner.r
                sites[path] = Site(replace(site.tuner, alpha=alpha, rslora=False), site.params)
                notes.append(Note("folded", path, "rsLoRA is one setting for all, so its root went into alpha"))
    return Adapter(sites, whole, adapter.meta, adapter.about), notes


def _array(value: Any) -> np.ndarray:
    """The numbers in their own dtype, where PEFT knows it, else in float32. Buffers of integers stay."""
    array = load(value)
    return array if array.dtype in STORED or array.dtype.kind in "iu" else array.astype("f4")


def _is_bias(name: str, adapter: Adapter) -> bool:
    """Whether a tensor was trained because of the setting `bias`."""
    path, _, leaf = name.rpartition(".")
    if leaf != "bias" or adapter.about.get("bias", "none") in (None, "none"):
        return False
    mine = any(path.endswith(s) for s in adapter.about.get("modules_to_save") or ())
    return not mine and (path in adapter.sites or f"{path}.weight" not in adapter.whole)


def _is_saved(name: str, adapter: Adapter) -> bool:
    """Whether a tensor is there because of the setting modules_to_save; PEFT saves grown embeddings without it."""
    path = name.rpartition(".")[0]
    if path in adapter.sites or _is_bias(name, adapter):
        return False
    saved = adapter.about.get("modules_to_save") or ()
    grown = (
        "peft_type" in adapter.about
        and path.rpartition(".")[2] in EMBEDDINGS
        and not any(path.endswith(s) for s in saved)
    )
    return not grown


def _whole_name(name: str, adapter: Adapter) -> str:
    """A replaced tensor of a module that is also adapted lies below PEFT's layer."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in adapter.sites and leaf in ("weight", "bias") else name


def _kind(adapter: Adapter) -> str:
    kinds = Counter(s.tuner.name for s in adapter.sites.values())
    tuners = set(kinds) - {"tokens", "experts"}
    if tuners <= set(VIRTUAL.values()) and list(adapter.sites) == [""]:
        return "VIRTUAL"
    if set(kinds) == {"tokens"}:
        return "TOKENS"
    if tuners <= {"ia3"} and tuners:
        return "IA3"
    if len(tuners) <= 1 and tuners <= set(LORAS) and (kinds or adapter.whole) and "" not in adapter.sites:
        return "LORA"
    raise Mismatch(
        f"PEFT's format holds one LoRA, DoRA or IA3 here, not {some(sorted(kinds)) or 'nothing'}",
        hint="write them apart",
    )


def _lora(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    sites = nested.settled({p: s for p, s in adapter.sites.items() if s.tuner.name != "tokens"})
    tokens = {p: s for p, s in adapter.sites.items() if s.tuner.name == "tokens"}
    experts = sorted(p for p, s in sites.items() if s.tuner.name == "experts")
    modules = sorted(p for p in sites if p not in experts and not nested.is_output(p, sites))
    config = _settings(sites, adapter.about) | {"peft_type": "LORA", "target_modules": modules}
    config |= {"target_parameters": experts, "peft_version": adapter.about.get("peft_version")} if experts else {}
    tensors: Tensors = {}
    for path, place in nested.places(sites).items():
        for letter, value in sites[path].params.items():
            tensors[PREFIX + _name(place, sites[path], letter)] = _shaped(letter, _array(value))
    for path, site in tokens.items():
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = _array(site.params["rows"])
    if tokens:
        config["trainable_token_indices"] = {p: load(s.params["index"]).tolist() for p, s in tokens.items()}
    return config, tensors


def _settings(sites: dict[str, Site], about: dict[str, Any]) -> dict[str, Any]:
    """What sites share, and patterns for those that differ."""
    tuners = {p: s.tuner for p, s in sites.items()}
    if not tuners:
        return {"r": 8, "lora_alpha": 8}
    for field in ("rslora", "dropout"):
        if len({getattr(t, field) for t in tuners.values()}) > 1:
            raise Mismatch(f"sites with different {field}, which PEFT's format says once for all")
    biased = {p for p, s in sites.items() if "c" in s.params}
    if biased and biased != set(sites):
        raise Mismatch(
            f"{some(sorted(set(sites) - biased))} has no trained bias, others have: lora_bias is one setting"
        )
    _possible(sites, bool(biased))
    r, alpha = (Counter(getattr(t, f) for t in tuners.values()).most_common(1)[0][0] for f in ("r", "alpha"))
    one = next(iter(tuners.values()))
    mine = {p: t for p, t in tuners.items() if not nested.is_output(p, sites)}
    return {
        "r": r,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exactly(p): t.r for p, t in mine.items() if t.r != r},
        "alpha_pattern": {exactly(p): _plain(t.alpha) for p, t in mine.items() if t.alpha != alpha},
        "use_rslora": one.rslora,
        "use_dora": one.name == "dora",
        "lora_bias": bool(biased),
        "lora_dropout": one.dropout,
        "bias": "none",
        "ensure_weight_tying": bool(about.get("ensure_weight_tying")),
        "fan_in_fan_out": any(map(_is_turned, tuners.values())),
        "init_lora_weights": one.name if one.name in ("pissa", "olora") else True,
    }


def _is_turned(tuner: Any) -> bool:
    return tuner.transposed and not tuner.embedding and tuner.name != "experts"


def _possible(sites: dict[str, Site], biased: bool) -> None:
    """Raises Mismatch for what PEFT refuses beside adapted parameters."""
    stacks, tuners = sorted(p for p, s in sites.items() if s.tuner.name == "experts"), [s.tuner for s in sites.values()]
    off = {"lora_bias": biased, "fan_in_fan_out": any(map(_is_turned, tuners))}
    off |= {"lora_dropout": any(t.dropout for t in tuners)}
    off |= {t.name: True for t in tuners if t.name not in ("lora", "experts")}
    if stacks and any(off.values()):
        what = next(k for k, v in off.items() if v)
        raise Mismatch(
            f"PEFT's format has no {what} beside adapted parameters ({some(stacks)})", hint="write them apart"
        )


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _name(path: str, site: Site, letter: str) -> str:
    if site.tuner.embedding and letter in "AB":
        return f"{path}.lora_embedding_{letter}"
    endings = {"A": "lora_A.weight", "B": "lora_B.weight", "c": "lora_B.bias", "m": "lora_magnitude_vector"}
    if letter not in endings:
        raise Mismatch(f"{quoted(path)} has {quoted(letter)!r}, which PEFT's LoRA has no name for")
    return f"{path}.{endings[letter]}"


def _tokens(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    """Rows of embeddings alone; one list of tokens is for all of them."""
    lists = [load(s.params["index"]).tolist() for s in adapter.sites.values()]
    if any(tokens != lists[0] for tokens in lists):
        raise Mismatch(f"{some(adapter.sites)} have different trained tokens, PEFT's format holds one list")
    mine = adapter.about.get("peft_type") == "TRAINABLE_TOKENS"  # a tied head has rows, and is no target of its own
    targets = adapter.about["target_modules"] if mine else sorted(adapter.sites)
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": targets, "token_indices": lists[0]}
    return config, {f"{PREFIX}{p}.trainable_tokens_delta": _array(s.params["rows"]) for p, s in adapter.sites.items()}


def _virtual(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    """Virtual tokens: their settings come from the file they were read from; else dimensions left out are the model's.

    PEFT halves the rows of an encoder-decoder, unless it is told not to.
    """
    site, kind = adapter.sites[""], adapter.about.get("peft_type")
    P, n = _array(site.params["P"]), site.tuner.tokens
    if kind in VIRTUAL:
        known = SCHEMAS[kind].keys() - COMMON.keys()
        return {k: v for k, v in adapter.about.items() if k in known} | {"peft_type": kind}, {"prompt_embeddings": P}
    kind = next(k for k, v in VIRTUAL.items() if v == site.tuner.name)
    parts = {} if site.tuner.name == "prefix" else {"num_transformer_submodules": len(P) // n}
    return {"peft_type": kind, "num_virtual_tokens": n, **parts}, {"prompt_embeddings": P}


def _shaped(letter: str, value: np.ndarray) -> np.ndarray:
    return value.reshape(-1) if letter == "c" else value


def _ia3(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    if "tokens" in {s.tuner.name for s in adapter.sites.values()}:
        raise Mismatch("PEFT's IA3 holds no trained token rows", hint="write them apart")
    feedforward = sorted(p for p, s in adapter.sites.items() if s.tuner.feedforward)
    config = {"peft_type": "IA3", "target_modules": sorted(adapter.sites), "feedforward_modules": feedforward}
    config |= {"fan_in_fan_out": any(s.tuner.transposed for s in adapter.sites.values()), "init_ia3_weights": True}
    tensors = {}
    for path, site in adapter.sites.items():
        l = _array(site.params["l"])
        tensors[f"{PREFIX}{path}.ia3_l"] = (
            l if l.ndim > 1 else l.reshape((1, -1) if site.tuner.feedforward else (-1, 1))
        )
    return config, tensors
