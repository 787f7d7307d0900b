"""Reading PEFT adapters: every tensor of the file becomes part of a site or of `whole`, or the file is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ... import registry
from ...adapter import Adapter, Site
from ...errors import AdaptKitError, Corrupt, Mismatch, quoted, some
from ...select import layer, matching
from ...store import pickles
from ...store.arrays import FLOATS, load
from ...store.checkpoint import Checkpoint, read_json, read_weights, warn
from ...store.entry import Entry
from ...store.shards import nearby
from ..base import Format, Note
from . import build
from .config import read_config, whose, with_heads
from .keys import Key, is_attention_output, parse
from .patterns import unmatched
from .write import write

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")  # the last one is torchtune's
Parts = dict[str, Entry]


class Peft(Format):
    """PEFT: adapter_config.json beside adapter_model.safetensors or .bin."""

    name = "peft"
    cannot = ("tuners of two kinds in one folder", "another dropout for each module")

    def sniff(self, path: Path) -> bool:
        if path.is_file():
            return path.name in WEIGHTS and not _foreign(path.parent)
        path = _inner(path)
        if (path / "config.json").exists() and not (path / CONFIG).exists():
            return False
        return not _foreign(path) and ((path / CONFIG).exists() or any((path / w).exists() for w in WEIGHTS))

    def adapted(self, entries: Mapping[str, Entry]) -> list[str]:
        """The names among the tensors of a training run that are an adapter's."""
        from . import state

        return state.adapted(entries)

    def taken(self, checkpoint: Checkpoint, settings: Path) -> tuple[Adapter, list[str]]:
        """The adapter among the tensors of a training run, and the names that are not its own."""
        from . import state

        return state.taken(checkpoint, settings)

    def read(self, path: Path, *, base: Path | None = None) -> Adapter:
        path = _inner(path)
        folder = path if path.is_dir() else path.parent
        if not (folder / CONFIG).exists():
            raise Corrupt("not found", where=CONFIG, hint="without it the scale of the update is unknown")
        config = read_config(folder / CONFIG)
        file = path if path.is_file() else _weights(folder)
        entries, metadata = read_weights(file)
        if file.suffix != ".safetensors":
            pickles.check_crc(file)
        try:
            _numbered(entries, folder)
            adapter = assemble(config, entries)
        except AdaptKitError as e:
            raise e.at(file.name) from None
        adapter.meta |= {"path": str(folder), "base": str(config.get("base_model_name_or_path") or "")}
        adapter.meta |= {f"peft:{k}": v for k, v in metadata.items()}
        return adapter

    def write(
        self, adapter: Adapter, path: Path, *, base: Path | None = None, drop: Collection[str] = (), **how: Any
    ) -> list[Note]:
        return write(adapter, path, drop=drop, **how)


def _inner(path: Path) -> Path:
    """The only adapter in a folder: PEFT saves one whose name is not "default" in a folder of that name."""
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, "config.json", *WEIGHTS)):
        return path
    found = [p for p in path.iterdir() if (p / CONFIG).is_file() and any((p / w).is_file() for w in WEIGHTS)]
    return found[0] if len(found) == 1 else path


def _foreign(folder: Path) -> bool:
    """Whether the settings are those of another installed format that uses the same file name."""
    try:
        other = whose(read_json(folder / CONFIG)) or ""
    except AdaptKitError:
        return False  # damaged or not there: reading says which
    return other.lower() in registry.names("formats")


def _numbered(entries: Mapping[str, Entry], folder: Path) -> None:
    """Raises Mismatch for tensors without numbers, which ZeRO-3 writes when nobody gathers the weights."""
    empty = [name for name, e in entries.items() if not e.numel]
    if not empty:
        return
    name = nearby(folder)
    where = f"{folder.name}/{name}" if name else "the run's shards (global_step*/ or pytorch_model_fsdp_0/)"
    raise Mismatch(
        f"{len(empty)} of {len(entries)} tensors hold no numbers ({some(empty, 1)}): it was saved from a sharded run, and "
        f"the numbers are in {quoted(where)}",
        hint=f"adaptkit convert {quoted(where) if name else 'SHARDS'} --to peft",
    )


def _weights(folder: Path) -> Path:
    found = [folder / w for w in WEIGHTS if (folder / w).exists()]
    if not found:
        name = nearby(folder)
        raise Corrupt(
            f"holds {CONFIG} but no weights ({' or '.join(WEIGHTS[:2])})",
            where=folder.name,
            hint=f"the numbers are in {quoted(name)}: adaptkit convert --to peft" if name else "fetch it again",
        )
    if len(found) > 1:
        warn(f"{folder.name} holds {found[0].name} and {found[1].name}; the first is read")
    return found[0]


def assemble(config: dict[str, Any], entries: dict[str, Entry]) -> Adapter:
    """An adapter from its settings and its tensors. Raises Mismatch for a tensor that has no place."""
    if not entries:
        raise Mismatch("holds no tensors", hint="was it saved from a sharded run? then the numbers are in the shards")
    _dtypes(entries)
    modules, whole = _group(entries)
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


def _group(entries: dict[str, Entry]) -> tuple[dict[tuple[str, int], Parts], dict[str, Entry]]:
    modules: dict[tuple[str, int], Parts] = defaultdict(dict)
    whole: dict[str, Entry] = {}
    seen: dict[Key, str] = {}
    for name, entry in entries.items():
        key = parse(name)
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
    twice = any(is_attention_output(e.name) for e in parts.values())
    return name, build.lora(config, name, parts, experts=bool(parameter), times=2.0 if twice else 1.0)


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
