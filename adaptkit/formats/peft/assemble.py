"""From settings and tensors to an adapter: every tensor becomes part of a site or of `whole`, or is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from ...adapter import Adapter, Site
from ...errors import Corrupt, Mismatch, quoted, some
from ...select import layer, matching
from ...store.arrays import FLOATS, load
from ...store.checkpoint import warn
from ...store.entry import Entry
from . import build
from .config import with_heads
from .keys import ALONE, PREFIX, Key, is_attention_output, parse
from .patterns import unmatched

Parts = dict[str, Entry]


def assemble(config: dict[str, Any], entries: dict[str, Entry]) -> Adapter:
    """An adapter from its settings and its tensors. Raises Mismatch for a tensor that has no place."""
    if not entries:
        raise Mismatch("holds no tensors", hint="was it saved from a sharded run? then the numbers are in the shards")
    _dtypes(entries)
    modules, whole = _group(entries, ALONE if config["peft_type"] in build.VIRTUAL else PREFIX)
    adapter = Adapter(meta={"peft:config": json.dumps(config, sort_keys=True)})
    adapter.about = config = with_heads(config)
    if config["peft_type"] in build.VIRTUAL:
        adapter.sites[""] = build.virtual(config, modules.pop(("", 0), {}))
        _nothing_left(config, modules)
    depths: dict[str, list[int]] = defaultdict(list)
    for path, depth in sorted(modules):
        depths[path].append(depth)
    for (path, depth), parts in modules.items():
        name, site = _site(config, path, depth, parts, depths[path])
        if name in adapter.sites:
            raise Corrupt(f"two sets of factors for {quoted(name)}")
        adapter.sites[name] = site
    adapter.whole = dict(whole)
    _justified(config, adapter)
    return adapter


def _dtypes(entries: dict[str, Entry]) -> None:
    for name, e in entries.items():
        if e.dtype not in FLOATS and not _is_buffer(e):
            raise Mismatch(f"{quoted(name)} has dtype {e.dtype}, adapters hold F32, F16, BF16 or F64")


def _is_buffer(e: Entry) -> bool:
    return e.dtype in ("I64", "I32") and parse(e.name).part == "whole"  # BatchNorm's counters


def _group(entries: dict[str, Entry], prefix: str) -> tuple[dict[tuple[str, int], Parts], dict[str, Entry]]:
    modules: dict[tuple[str, int], Parts] = defaultdict(dict)
    whole: dict[str, Entry] = {}
    seen: dict[Key, str] = {}
    for name, entry in entries.items():
        key = parse(name, prefix)
        if key.part == "training":
            continue
        if key in seen:
            _same(entry, entries[seen[key]])
            continue
        seen[key] = name
        if key.part == "whole":
            whole[key.path] = entry
        else:
            modules[key.path, key.depth][key.part] = entry
    return dict(modules), whole


def _same(a: Entry, b: Entry) -> None:
    """A tensor under two names, as PEFT writes the bias of a saved module, is fine as long as they agree."""
    if a.shape != b.shape or not (load(a) == load(b)).all():
        raise Corrupt(f"{quoted(a.name)} and {quoted(b.name)} are two spellings of one tensor, with other values")


def _site(config: dict[str, Any], path: str, depth: int, parts: Parts, depths: list[int]) -> tuple[str, Site]:
    """A module's site. depths: all depths at which the module is wrapped."""
    if "rows" in parts:
        return path, build.tokens(config, path, parts)
    if config["peft_type"] == "IA3":
        return path, build.ia3(config, path, parts)
    if config["peft_type"] == "ADALORA":
        return path, build.adalora(config, path, parts)
    parameter = build.parameter(config, path, depth, depths)
    name = f"{path}.{parameter}" if parameter else path
    if any(is_attention_output(e.name) for e in parts.values()):
        # PEFT gives it the attention's rank and alpha, and adds its update twice
        return name, build.lora(config, name, parts, experts=False, times=2.0, named=_attention(name))
    return name, build.lora(config, name, parts, experts=bool(parameter))


def _nothing_left(config: dict[str, Any], modules: dict) -> None:
    if modules:
        path = next(iter(modules))[0]
        raise Mismatch(f"{quoted(path)} has tensors that no {config['peft_type']} adapter holds")


def _justified(config: dict[str, Any], adapter: Adapter) -> None:
    """Every tensor outside the sites must be there for a reason that the settings give."""
    saved = [n for n in config.get("modules_to_save") or () if n]
    for name in adapter.whole:
        path, _, leaf = name.rpartition(".")
        # PEFT matches the end of a path without regard for dots ("head" hits "lm_head")
        if any(f"{path}.".find(f"{s}.") >= 0 or path.endswith(s) for s in saved):
            continue
        if leaf == "bias" and config.get("bias", "none") != "none":
            continue
        if leaf == "weight" and path.rpartition(".")[2] in build.EMBEDDINGS:
            continue
        raise Mismatch(
            f"{quoted(name)} is no part of a {config['peft_type']} adapter and not among modules_to_save",
            hint="is it damaged, or of another program?",
        )
    if config.get("bias", "none") != "none" and not any(n.endswith("bias") for n in adapter.whole):
        warn(f"the settings say bias={config['bias']!r}, but the file holds no bias")
    if config["peft_type"] == "LORA":  # AdaLoRA keeps lists of what it pruned under the same key
        unmatched(config, [n for n in adapter.sites if n])
    _covered(config, adapter)


def _covered(config: dict[str, Any], adapter: Adapter) -> None:
    """The settings and the tensors must speak of the same modules."""
    targets = config.get("target_modules")
    modules = [n for n, s in adapter.sites.items() if n and s.tuner.name != "tokens"]
    if not modules or config.get("ensure_weight_tying") or config.get("target_parameters"):
        return
    if not targets or (isinstance(targets, list) and "" in targets):
        warn("the settings do not say which modules are adapted; the tensors do")
    if not targets or targets == "all-linear":
        return
    hit = matching(targets, modules + [_attention(m) for m in modules])
    if lost := [m for m in modules if m not in hit and _attention(m) not in hit]:
        shown = targets if isinstance(targets, str) else some(sorted(targets))
        raise Mismatch(f"holds tensors for {some(lost)}, which target_modules ({quoted(shown)}) does not name")
    _layers(config, modules)


def _attention(module: str) -> str:
    return module.removesuffix(".out_proj")


def _layers(config: dict[str, Any], modules: list[str]) -> None:
    wanted = config.get("layers_to_transform")
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not wanted:
        return
    exact = set(config["target_modules"]) if isinstance(config["target_modules"], list) else set()
    for module in modules:
        index = layer(module, config.get("layers_pattern"))
        # before 0.20 PEFT took the last number of a path for the layer, so any number of it may be meant
        numbers = {index, *(int(n) for n in module.split(".") if n.isdecimal())}
        if index is not None and module not in exact and not numbers & set(wanted):
            raise Mismatch(f"holds tensors for {quoted(module)}, which layers_to_transform {wanted} leaves out")
