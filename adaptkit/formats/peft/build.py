"""Sites from the settings and the tensors of one module."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import registry
from ...adapter import Site
from ...errors import Corrupt, Mismatch, quoted, some
from ...select import matching
from ...store.arrays import load
from ...store.entry import Entry
from ...tuners.experts import REGISTERED
from .patterns import lookup

Parts = dict[str, Entry]
VIRTUAL = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix", "P_TUNING": "ptuning"}
EMBEDDINGS = (
    "embed_tokens embed_in embed_out lm_head wte word_embeddings shared embeddings tok_embeddings output "
    "token_embedding embed_positions wpe"
).split()


def virtual(config: dict[str, Any], parts: Parts) -> Site:
    """The site of the whole model. P: (tokens, width)"""
    if set(parts) != {"P"}:
        raise Corrupt("holds no prompt_embeddings")
    rows = config.get("num_virtual_tokens") or parts["P"].shape[0]
    return Site(registry.load("tuners", VIRTUAL[config["peft_type"]])(tokens=rows), parts)


def tokens(config: dict[str, Any], path: str, parts: Parts) -> Site:
    """Rows of an embedding that replace those of the base. The indices are in the settings only."""
    given = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(given, dict):
        name = next((n for n in given if path == n or path.endswith("." + n)), None)
        given = given.get(name)
    if not given:
        raise Mismatch(f"{quoted(path)} has trained token rows, but trainable_token_indices does not say which")
    if extra := set(parts) - {"rows"}:
        raise Mismatch(f"{quoted(path)} has trained token rows and also {some(sorted(extra))}")
    # PEFT keeps rows in the order of the list as it was given
    index = np.asarray(given, dtype=np.int64)
    if len(set(given)) != len(given):
        raise Mismatch(f"trainable_token_indices names a token twice for {quoted(path)}")
    return Site(registry.load("tuners", "tokens")(), {"index": index, "rows": parts["rows"]})


def ia3(config: dict[str, Any], path: str, parts: Parts) -> Site:
    """One vector. Its side is told by its shape, or, for convolutions, by feedforward_modules."""
    if set(parts) != {"l"}:
        raise Mismatch(f"{quoted(path)} has {some(sorted(parts))}, an IA3 adapter holds ia3_l only")
    shape = parts["l"].shape
    named = _is_feedforward(config.get("feedforward_modules") or [], path)
    told = len(shape) == 2 and shape[0] != shape[1]
    return Site(registry.load("tuners", "ia3")(feedforward=shape[0] == 1 if told else named), parts)


def _is_feedforward(rule: str | list[str], path: str) -> bool:
    if isinstance(rule, str):
        return bool(matching(rule, [path]))
    return any(path.endswith(entry) for entry in rule)  # PEFT asks for no dot here


def lora(
    config: dict[str, Any], path: str, parts: Parts, experts: bool, times: float = 1.0, named: str | None = None
) -> Site:
    """The factors of one module, with the tuner that the settings and the tensors agree on.

    times: of alpha, how often the update is added.    named: the module whose name patterns are held against.
    """
    embedding = bool({"eA", "eB"} & set(parts))
    turned = embedding or bool(config.get("fan_in_fan_out"))
    parts = _without_embedding_names(path, parts)
    _complete(config, path, parts)
    r = int(lookup(config.get("rank_pattern"), named or path, config["r"]))
    alpha = float(lookup(config.get("alpha_pattern"), named or path, config["lora_alpha"])) * times
    name, more = _kind(config, path, parts, experts, embedding)
    _rank(path, r, parts, experts, more)
    settings = {"r": r, "alpha": alpha, "rslora": bool(config.get("use_rslora")), "transposed": turned}
    settings |= {"embedding": embedding, "dropout": float(config.get("lora_dropout") or 0.0)}
    return Site(registry.load("tuners", name)(**settings, **more), parts)


def adalora(config: dict[str, Any], path: str, parts: Parts) -> Site:
    """A LoRA that does the same: A' = E A, at AdaLoRA's scale alpha / (init_r + 1e-5), whatever rank is left."""
    if set(parts) != {"aA", "aB", "aE"}:
        raise Mismatch(f"{quoted(path)} has {some(sorted(parts))}, an AdaLoRA adapter holds lora_A, lora_B and lora_E")
    A, B, E = (parts[k].shape for k in ("aA", "aB", "aE"))
    if not (len(A) == len(B) == 2 and A[0] == B[1] > 0 and (A[0], 1) == E):
        raise Mismatch(f"{quoted(path)}: lora_A {list(A)}, lora_B {list(B)} and lora_E {list(E)} do not share a rank")
    r, stored = A[0], load(parts["aA"])
    wide = stored.astype("f4") if stored.dtype.itemsize < 4 else stored
    alpha = float(config.get("lora_alpha") or 8) * r / (int(config.get("init_r") or 12) + 1e-5)
    lora = registry.load("tuners", "lora")(r=r, alpha=alpha, transposed=bool(config.get("fan_in_fan_out")))
    return Site(lora, {"A": wide * load(parts["aE"], wide.dtype), "B": parts["aB"]})


def _without_embedding_names(path: str, parts: Parts) -> Parts:
    if {"A", "B"} & set(parts) and {"eA", "eB"} & set(parts):
        raise Mismatch(f"{quoted(path)} has factors of a linear layer and of an embedding")
    return {p.removeprefix("e"): e for p, e in parts.items()}


def _complete(config: dict[str, Any], path: str, parts: Parts) -> None:
    for have, lack in (("A", "B"), ("B", "A")):
        if have in parts and lack not in parts:
            raise Mismatch(
                f"{quoted(path)} has lora_{have} but no lora_{lack}; the module is incomplete", hint="fetch it again"
            )
    if "A" not in parts:
        raise Mismatch(f"{quoted(path)} has {some(sorted(parts))} but no factors")
    if extra := set(parts) - {"A", "B", "c", "m", "d"}:
        raise Mismatch(f"{quoted(path)} has {some(sorted(extra))}, which no LoRA adapter holds")
    for part, key, what in (("m", "use_dora", "a magnitude vector"), ("d", "kasa_config", "a KaSA diagonal")):
        if (part in parts) != bool(config.get(key)):
            state = "on" if config.get(key) else "off"
            raise Mismatch(
                f"{key} is {state}, but {quoted(path)} has {what if part in parts else 'no ' + what.removeprefix('a ')}"
            )


def _rank(path: str, r: int, parts: Parts, experts: bool, more: dict[str, Any]) -> None:
    A, B = parts["A"].shape, parts["B"].shape
    if more.get("side") == "B":
        B = (B[0], B[1] * more["blocks"], *B[2:])  # stored without the zeros of its blocks
    if len(A) < 2 or len(B) < 2:
        raise Mismatch(
            f"{quoted(path)}: lora_A has shape {list(A)} and lora_B {list(B)}, matrices are expected",
            hint="was it saved from a sharded run? then the numbers are in the shards",
        )
    ok = A[0] == B[1] and A[0] > 0 and (A[0] % r == 0 if experts else A[0] == r)
    if not ok and len(A) > 2 and B[1] < r == A[0] and r % B[1] == 0:
        raise Mismatch(
            f"{quoted(path)} is a convolution with {r // B[1]} groups, and LoRA on it has no merged weight: "
            "its update mixes channels that the layer keeps apart",
            hint="serve it as an adapter",
        )
    if not ok and A[0] == B[1]:
        raise Mismatch(
            f"r={r}, but lora_A of {quoted(path)} has rank {A[0]}: the scale would be wrong",
            where="adapter_config.json",
        )
    if not ok:
        raise Mismatch(f"{quoted(path)}: lora_A {list(A)} and lora_B {list(B)} do not share a rank of {r}")


def _kind(
    config: dict[str, Any], path: str, parts: Parts, experts: bool, embedding: bool
) -> tuple[str, dict[str, Any]]:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() in ("pissa", "olora") and not embedding:  # PEFT starts those plainly
        return start.lower(), {}
    if "m" in parts:
        return "dora", {}
    if "d" in parts:
        return "kasa", {}
    if bd := config.get("use_bdlora"):
        return _block_diagonal(bd, path)
    return ("experts", {}) if experts else ("lora", {})


def _block_diagonal(settings: dict[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    for side, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b")):
        if any(part in path for part in settings.get(key) or ()):  # PEFT: anywhere in the path
            return "bdlora", {"side": side, "blocks": int(settings.get("nblocks", 1))}
    return "lora", {}


def parameter(config: dict[str, Any], path: str, depth: int, depths: list[int]) -> str | None:
    """The bare parameter that factors at one depth of wrapping belong to; None for an ordinary module.

    The file does not say it: it follows from target_parameters and the order in which the module registered them.
    """
    leaves = sorted(_leaves(config, path), key=lambda n: REGISTERED.index(n) if n in REGISTERED else -1)
    targets = config.get("target_modules") or []
    if not leaves or (depths == [0] and matching(targets, [path])):
        if depth:
            raise Mismatch(f"{quoted(path)} is wrapped {depth + 1} times, but target_parameters does not say by what")
        return None
    if len(leaves) > 1 and not set(leaves) <= set(REGISTERED):
        raise Mismatch(f"cannot tell which of {some(leaves)} the factors of {quoted(path)} belong to")
    if len(leaves) < len(depths):
        raise Mismatch(f"{quoted(path)} has {len(depths)} sets of factors, target_parameters names {some(leaves)}")
    # fewer sets than names: a name that the model does not have; those that exist keep their order
    return leaves[-1 - depth] if len(leaves) == len(depths) else _only(leaves, path)


def _leaves(config: dict[str, Any], path: str) -> set[str]:
    """The parameters of a module that target_parameters names: those with the module's name, or else the bare ones."""
    entries = [entry.rpartition(".") for entry in config.get("target_parameters") or ()]
    mine = {leaf for parent, _, leaf in entries if parent and (path == parent or path.endswith("." + parent))}
    return mine or {leaf for parent, _, leaf in entries if not parent}


def _only(leaves: list[str], path: str) -> str:
    raise Mismatch(
        f"target_parameters names {some(leaves)}, and the file does not say which one the factors of {quoted(path)} are for"
    )
