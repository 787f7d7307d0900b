"""What inference servers take of an adapter: plain LoRA, one rank and one alpha, and little else.

fold   B' = (s / s0) B, where the sites' scales s differ: the server knows one, s0 = alpha / r
pad    A' = [A; 0], B' = [B, 0]: the same product with the one rank

Servers leave out without a word what they do not know (patterns, rsLoRA), so here it is made plain, or refused. What
each takes: vLLM, vllm/lora/peft_helper.py and lora_model.py; SGLang, srt/lora; TensorRT-LLM, hf_lora_convert.py;
Ollama, https://docs.ollama.com/modelfile#adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..adapter import Adapter, Site
from ..errors import Mismatch, Usage, quoted, some
from ..store.arrays import NUMPY, dtype_of, load, shape_of
from ..store.checkpoint import open_checkpoint, read_json
from .base import Note
from .fold import WORDS, padded, with_scale, without


@dataclass(frozen=True)
class Server:
    """What a server takes. holds: kinds of parts beyond LoRA on linear layers.   ranks: what can be set as the largest."""

    name: str
    formats: tuple[str, ...]
    holds: frozenset[str]
    ranks: tuple[int, ...] = ()
    flag: str = ""
    models: tuple[str, ...] = ()  # model types, where only some are taken


SERVERS = {
    "vllm": Server(
        "vllm", ("peft",), frozenset({"embedding"}), (1, 8, 16, 32, 64, 128, 256, 320, 512), "--max-lora-rank"
    ),
    "sglang": Server("sglang", ("peft",), frozenset({"embedding"}), flag="--max-lora-rank"),
    "trtllm": Server("trtllm", ("peft",), frozenset(), flag="max_lora_rank"),
    "ollama": Server("ollama", ("peft", "gguf"), frozenset(), models=("llama", "mistral", "gemma", "gemma2")),
}
KINDS = {k: WORDS[k] for k in ("dora", "bias", "whole", "tokens", "embedding", "conv", "experts")}


def prepared(
    adapter: Adapter, server: str, drop: Collection[str] = (), base: Path | None = None
) -> tuple[Adapter, list[Note]]:
    """The adapter as a server takes it, and what was done to it. drop: kinds of parts that may be left out.

    Raises Mismatch for what the server cannot hold and `drop` does not name.
    """
    rules = SERVERS[server]
    if strange := sorted(set(drop) - KINDS.keys()):
        raise Usage(f"{some(strange)} is not one of {', '.join(KINDS)}", where="--drop")
    notes: list[Note] = []
    _architecture(rules, adapter, base, notes)
    made = Adapter(dict(adapter.sites), dict(adapter.whole), dict(adapter.meta), dict(adapter.about))
    _whole(made, rules, drop, notes)
    _sites(made, rules, drop, notes)
    if not made.sites:
        raise Mismatch(f"nothing is left that {server} can hold")
    if server == "vllm":
        _split_experts(made, base, notes)
    if server == "sglang":
        _paired(made, base, notes)
    _uniform(made, notes)
    _ranked(made, rules, notes)
    return made, notes


def _refused(rules: Server, kind: str, names: Iterable[str]) -> Mismatch:
    hint = f"--drop {kind} leaves it out, which changes what the adapter does" if kind in KINDS else None
    return Mismatch(f"{rules.name} cannot hold {KINDS[kind]} ({some(names)})", where="--for", hint=hint)


def _architecture(rules: Server, adapter: Adapter, base: Path | None, notes: list[Note]) -> None:
    if not rules.models:
        return
    file = base / "config.json" if base is not None and base.is_dir() else None
    kind = read_json(file).get("model_type") if file is not None and file.is_file() else None
    if kind is None:
        text = f"{rules.name} takes adapters of {', '.join(rules.models)} only; --base would tell"
        notes.append(Note("kept", adapter.meta.get("base") or "the base model", text))
    elif kind not in rules.models:
        raise Mismatch(
            f"{rules.name} takes adapters of {', '.join(rules.models)}, not of {quoted(kind)}", where="--for"
        )


# what is no plain LoRA


def _whole(made: Adapter, rules: Server, drop: Collection[str], notes: list[Note]) -> None:
    for kind in ("bias", "whole"):
        names = [n for n in made.whole if n.endswith(".bias") == (kind == "bias")]
        if names and kind not in drop:
            raise _refused(rules, kind, names)
        for name in names:
            del made.whole[name]
            notes.append(Note("dropped", name, f"{rules.name} cannot hold {KINDS[kind]}"))


def _sites(made: Adapter, rules: Server, drop: Collection[str], notes: list[Note]) -> None:
    for path, site in list(made.sites.items()):
        kind = _kind(site)
        if kind == "lora" or kind in rules.holds or (kind == "experts" and rules.name == "vllm"):
            continue
        if kind not in KINDS:
            hint = "merge it into the base model and serve that"
            raise Mismatch(
                f"{rules.name} takes LoRA only, {quoted(path) or 'the adapter'} is {kind}", where="--for", hint=hint
            )
        if kind not in drop:
            raise _refused(rules, kind, [path])
        notes.append(Note("dropped", path, f"{rules.name} cannot hold {KINDS[kind]}"))
        if kind in ("dora", "bias"):
            made.sites[path] = without(site, {kind})
        else:
            del made.sites[path]
    for path, site in made.sites.items():
        if "c" in site.params and "bias" not in drop:
            raise _refused(rules, "bias", [path])
        made.sites[path] = without(site, {"bias"})


def _kind(site: Site) -> str:
    name = site.tuner.name
    if name == "tokens":
        return "tokens"
    if name not in ("lora", "dora", "experts"):
        return name
    if name == "lora" and "c" in site.params:
        return "bias"
    if name == "lora" and len(shape_of(site.params["A"])) > 2:
        return "conv"
    return "embedding" if site.tuner.embedding and name == "lora" else name


def _lora(tuner: Any, **changes: Any) -> Any:
    fields = ("r", "alpha", "rslora", "transposed", "embedding", "dropout")
    return registry.load("tuners", "lora")(**({f: getattr(tuner, f) for f in fields} | changes))


# experts


def _split_experts(made: Adapter, base: Path | None, notes: list[Note]) -> None:
    """One site for each expert and each of its matrices, as vLLM names them."""
    stacks = [p for p, s in made.sites.items() if s.tuner.name == "experts"]
    for home in dict.fromkeys(p.rpartition(".")[0] for p in stacks):
        mine = {p.rpartition(".")[2]: made.sites[p] for p in stacks if p.rpartition(".")[0] == home}
        if unknown := sorted(set(mine) - {"gate_up_proj", "down_proj"}):
            raise Mismatch(
                f"{quoted(home)}: {some(unknown)} cannot be split by expert", where="--for", hint="--drop experts"
            )
        _refuse_interleaved(home, base)
        turned = _turned(home, mine)
        for leaf, site in mine.items():
            made.sites.update(_experts(home, leaf, site, turned))
            del made.sites[f"{home}.{leaf}"]
            notes.append(Note("renamed", f"{home}.{leaf}", "split into one LoRA for each expert, as vllm names them"))


def _refuse_interleaved(home: str, base: Path | None) -> None:
    file = base / "config.json" if base is not None and base.is_dir() else None
    kind = read_json(file).get("model_type") if file is not None and file.is_file() else None
    if kind == "gpt_oss":
        raise Mismatch(
            f"{quoted(home)}: gpt_oss stores gate and up row by row in turn", where="--for", hint="--drop experts"
        )


def _turned(home: str, mine: dict[str, Site]) -> bool:
    """Whether the stacks are (in, out): told by gate and up being twice as wide as what down takes."""
    fits = []
    for turned in (False, True):
        sides = {leaf: _sides(site, turned) for leaf, site in mine.items()}
        (d, ff), (f, out) = sides.get("gate_up_proj", (None, None)), sides.get("down_proj", (None, None))
        fits.append(len(mine) == 2 and ff == 2 * f and d == out)
    if fits[0] == fits[1]:
        what = "one of gate_up_proj and down_proj alone does" if len(mine) < 2 else "square matrices do"
        raise Mismatch(f"{quoted(home)}: {what} not tell which side is the input", where="--for", hint="--drop experts")
    return fits[1]


def _sides(site: Site, turned: bool) -> tuple[int, int]:
    """(in, out) of one expert's matrix."""
    into, out = shape_of(site.params["A"])[1], shape_of(site.params["B"])[0]
    return (out, into) if turned else (into, out)


def _experts(home: str, leaf: str, site: Site, turned: bool) -> dict[str, Site]:
    A, B, r = load(site.params["A"]), load(site.params["B"]), site.tuner.r
    count, found = A.shape[0] // r, {}
    for e in range(count):
        a, b = A[e * r : (e + 1) * r], B[:, e::count]
        a, b = (b.T, a.T) if turned else (a, b)
        half = b.shape[0] // 2
        rows = {"down_proj": b} if leaf == "down_proj" else {"gate_proj": b[:half], "up_proj": b[half:]}
        for name, part in rows.items():
            params = {"A": np.ascontiguousarray(a), "B": np.ascontiguousarray(part)}
            found[f"{home}.{e}.{name}"] = Site(_lora(site.tuner, transposed=False), params)
    return found


# q and v


def _paired(made: Adapter, base: Path | None, notes: list[Note]) -> None:
    """Give q_proj its v_proj and the other way round, with factors that add nothing."""
    lacking = []
    for path in made.sites:
        home, _, leaf = path.rpartition(".")
        other = {"q_proj": "v_proj", "v_proj": "q_proj"}.get(leaf)
        if other and f"{home}.{other}" not in made.sites:
            lacking.append((f"{home}.{other}", made.sites[path]))
    if not lacking:
        return
    if base is None:
        raise Mismatch(
            f"sglang reads q_proj and v_proj together, and {some(p for p, _ in lacking)} is not adapted",
            where="--for",
            hint="give --base, so that factors of zeros can be added in its shape",
        )
    shapes = open_checkpoint(base).shapes
    for path, twin in lacking:
        name = next(
            (n for n in shapes if n == f"{path}.weight" or path.endswith("." + n.removesuffix(".weight"))), None
        )
        if name is None:
            raise Mismatch(f"the model has no {quoted(path)}", where="--base")
        out, dtype = shapes[name][0], NUMPY[dtype_of(twin.params["B"])]
        A = np.zeros(shape_of(twin.params["A"]), dtype)
        made.sites[path] = Site(twin.tuner, {"A": A, "B": np.zeros((out, twin.tuner.r), dtype)})
        notes.append(Note("padded", path, "zeros, since sglang reads q_proj and v_proj together"))


# one rank, one scale


def _uniform(made: Adapter, notes: list[Note]) -> None:
    """One rank and one alpha for all sites, and no rsLoRA."""
    r = max(s.tuner.r for s in made.sites.values())
    scale = _common(made, r)
    for path, site in made.sites.items():
        t = site.tuner
        if not math.isclose(t.scale, scale, rel_tol=1e-12):
            notes.append(Note("folded", path, f"scale {t.scale:g} became {scale:g} by B times {t.scale / scale:g}"))
        elif t.rslora:
            notes.append(Note("folded", path, f"rsLoRA's scale {t.scale:g} is now alpha / r"))
        if t.r != r:
            notes.append(Note("padded", path, f"rank {t.r} became {r} by zeros"))
        made.sites[path] = padded(with_scale(site, scale, path), r)


def _common(made: Adapter, r: int) -> float:
    """The scale that most sites have, if alpha is then a whole number; else 1."""
    scale = Counter(s.tuner.scale for s in made.sites.values()).most_common(1)[0][0]
    return scale if float(scale * r).is_integer() and scale * r != 0 else 1.0


def _ranked(made: Adapter, rules: Server, notes: list[Note]) -> None:
    r = next(iter(made.sites.values())).tuner.r
    if rules.ranks and r > rules.ranks[-1]:
        raise Mismatch(
            f"rank {r}, {rules.name} takes at most {rules.ranks[-1]}", where="--for", hint="adaptkit resize it"
        )
    if rules.flag:
        needed = next((n for n in rules.ranks if n >= r), r)
        notes.append(Note("kept", "rank", f"{r}: start {rules.name} with {rules.flag} {needed}"))
