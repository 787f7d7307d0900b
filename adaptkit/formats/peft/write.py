"""Writing PEFT adapters: one LoRA, IA3 or set of virtual tokens per folder, exact module paths, patterns where sites differ."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter import Adapter, Site
from ...errors import Mismatch, quoted, some
from ...store.arrays import dtype_of, load, rounded
from ...store.disk import write_all
from ...store.entry import Entry
from ...store.output import Output
from ...store.safetensors import header
from .build import VIRTUAL
from .keys import PREFIX
from .patterns import exactly

LORAS = ("lora", "dora")
Tensors = dict[str, np.ndarray]


def write(adapter: Adapter, path: Path, *, dtype: str | None = None, **how: Any) -> None:
    """Write a folder with adapter_config.json and adapter_model.safetensors that appears whole.

    dtype: of the factors, as safetensors spells it; tensors replaced outright then keep theirs. All are float32 when it
    is left out.     how: overwrite, inputs, beside and made, as `_save` takes them.
    Raises Mismatch for what PEFT's format cannot hold, Usage when the folder is not empty.
    """
    kind = _kind(adapter)
    config, tensors = {"LORA": _lora, "IA3": _ia3}.get(kind, _virtual)(adapter)
    if dtype is not None:
        tensors = {n: rounded(v, dtype) for n, v in tensors.items()}
    prefix = PREFIX if kind in ("LORA", "IA3") else "base_model."
    for name, value in adapter.whole.items():
        whole = load(value, np.dtype("f4")) if dtype is None else value
        tensors[prefix + _whole_name(adapter, name)] = whole
    modules = sorted({n.rpartition(".")[0] for n in adapter.whole if not _is_loose(adapter, n)})
    config |= {"modules_to_save": modules or None, "base_model_name_or_path": adapter.meta.get("base") or None}
    config |= {"inference_mode": True, "task_type": adapter.about.get("task_type")}
    if any(_is_loose(adapter, n) for n in adapter.whole):
        config["bias"] = adapter.about["bias"]
    _save(path, config, tensors, **how)


def _is_loose(adapter: Adapter, name: str) -> bool:
    """Whether a tensor is a bias that the setting `bias` accounts for, and no part of a module that is saved whole."""
    path, _, leaf = name.rpartition(".")
    trained = adapter.about.get("bias", "none") != "none" and leaf == "bias"
    return trained and (path in adapter.sites or f"{path}.weight" not in adapter.whole)


def _whole_name(adapter: Adapter, name: str) -> str:
    """A bias keeps its name, but the module that PEFT wraps around an adapted one comes between."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if _is_loose(adapter, name) and path in adapter.sites else name


def _kind(adapter: Adapter) -> str:
    kinds = Counter(s.tuner.name for s in adapter.sites.values())
    if set(adapter.sites) == {""} and set(kinds) <= set(VIRTUAL.values()):
        return "virtual"
    tuners = set(kinds) - {"tokens"}
    if tuners <= {"ia3"} and tuners:
        return "IA3"
    if len(tuners) <= 1 and tuners <= set(LORAS) and "" not in adapter.sites:
        return "LORA"
    raise Mismatch(
        f"PEFT's format holds one LoRA, DoRA, IA3 or set of virtual tokens here, not {some(sorted(kinds))}",
        hint="write them apart",
    )


def _lora(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    sites = {p: s for p, s in adapter.sites.items() if s.tuner.name != "tokens"}
    tokens = {p: s for p, s in adapter.sites.items() if s.tuner.name == "tokens"}
    config = _settings(sites) | {"peft_type": "LORA", "target_modules": sorted(sites)}
    tensors: Tensors = {}
    for path, site in sites.items():
        for letter, value in site.params.items():
            tensors[PREFIX + _name(path, site, letter)] = _shaped(letter, load(value, np.dtype("f4")))
    for path, site in tokens.items():
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = load(site.params["rows"], np.dtype("f4"))
    if tokens:
        config["trainable_token_indices"] = {p: load(s.params["index"]).tolist() for p, s in tokens.items()}
    return config, tensors


def _settings(sites: dict[str, Site]) -> dict[str, Any]:
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
    r, alpha = (Counter(getattr(t, f) for t in tuners.values()).most_common(1)[0][0] for f in ("r", "alpha"))
    one = next(iter(tuners.values()))
    return {
        "r": r,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exactly(p): t.r for p, t in tuners.items() if t.r != r},
        "alpha_pattern": {exactly(p): _plain(t.alpha) for p, t in tuners.items() if t.alpha != alpha},
        "use_rslora": one.rslora,
        "use_dora": one.name == "dora",
        "lora_bias": bool(biased),
        "lora_dropout": one.dropout,
        "bias": "none",
        "fan_in_fan_out": any(t.transposed and not t.embedding for t in tuners.values()),
        "init_lora_weights": True,
    }


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _name(path: str, site: Site, letter: str) -> str:
    if site.tuner.embedding and letter in "AB":
        return f"{path}.lora_embedding_{letter}"
    endings = {"A": "lora_A.weight", "B": "lora_B.weight", "c": "lora_B.bias", "m": "lora_magnitude_vector"}
    if letter not in endings:
        raise Mismatch(f"{quoted(path)} has {quoted(letter)!r}, which PEFT's LoRA has no name for")
    return f"{path}.{endings[letter]}"


def _shaped(letter: str, value: np.ndarray) -> np.ndarray:
    return value.reshape(-1) if letter == "c" else value


def _virtual(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    """Dimensions that are left out are the model's. PEFT halves the rows of an encoder-decoder, unless it is told not to."""
    site = adapter.sites[""]
    kind = next(k for k, v in VIRTUAL.items() if v == site.tuner.name)
    P, n = load(site.params["P"], np.dtype("f4")), site.tuner.tokens
    config: dict[str, Any] = {"peft_type": kind, "num_virtual_tokens": n}
    if site.tuner.name != "prefix":
        config["num_transformer_submodules"] = len(P) // n
    return config, {"prompt_embeddings": P}


def _ia3(adapter: Adapter) -> tuple[dict[str, Any], Tensors]:
    if "tokens" in {s.tuner.name for s in adapter.sites.values()}:
        raise Mismatch("PEFT's IA3 holds no trained token rows", hint="write them apart")
    feedforward = sorted(p for p, s in adapter.sites.items() if s.tuner.feedforward)
    config = {"peft_type": "IA3", "target_modules": sorted(adapter.sites), "feedforward_modules": feedforward}
    config |= {"fan_in_fan_out": any(s.tuner.transposed for s in adapter.sites.values()), "init_ia3_weights": True}
    tensors = {}
    for path, site in adapter.sites.items():
        l = load(site.params["l"], np.dtype("f4"))
        tensors[f"{PREFIX}{path}.ia3_l"] = (
            l if l.ndim > 1 else l.reshape((1, -1) if site.tuner.feedforward else (-1, 1))
        )
    return config, tensors


def _save(
    path: Path,
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray | Entry],
    *,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    beside: Collection[tuple[Path, str]] = (),
    made: Mapping[str, Any] | None = None,
) -> None:
    """inputs: folders that the output must stay out of.   beside: (file, name) to copy.   made: for adaptkit.json."""
    arrays = {n: tensors[n] for n in sorted(tensors)}
    head = header(((n, dtype_of(a), a.shape, a.nbytes) for n, a in arrays.items()), {"format": "pt"})
    settings = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    size = len(head) + sum(a.nbytes for a in arrays.values())
    plan = hashlib.sha256(settings + head)
    for a in arrays.values():
        plan.update(repr((a.file, a.offset)).encode() if isinstance(a, Entry) else np.ascontiguousarray(a).view("u1"))
    need = size + len(settings) + sum(file.stat().st_size for file, _ in beside)
    files, places = 2 + len(beside), {"inputs": inputs, "overwrite": overwrite}
    with Output(path, plan=plan.hexdigest(), need=need, files=files, **places) as out:
        if not out.done("adapter_model.safetensors"):
            with out.file("adapter_model.safetensors", size) as fd:
                write_all(fd, head, 0)
                at = len(head)
                for a in arrays.values():
                    raw = np.ascontiguousarray(load(a)).reshape(-1).view("u1")
                    write_all(fd, memoryview(raw), at)
                    at += raw.size
        if not out.done("adapter_config.json"):
            with out.file("adapter_config.json", len(settings)) as fd:
                write_all(fd, settings, 0)
        for file, name in beside:
            if not out.done(name):
                out.copy(file, name)
        out.publish({"made": made or {"verb": "write", "format": "peft"}})
