"""From a model's parameter names to tensor names on disk.

Direct names come first: equal, or with one base-model prefix more or less ("transformer.h.0..." and "h.0..."). What
they do not explain goes to transformers' own conversion tables (conversions.py), imported only then.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import Mismatch, quoted, some
from .conversions import Edge

# parameters a module may have instead of `weight`; nn.MultiheadAttention keeps its input projection in one
LEAVES = ("weight", "", "in_proj_weight")


def direct(wanted: str, disk: Collection[str], prefixes: Collection[str]) -> str | None:
    """The disk name of a parameter, when it is equal up to one prefix."""
    if wanted in disk:
        return wanted
    stripped = wanted.partition(".")[2]
    if stripped and stripped in disk and wanted.partition(".")[0] in PREFIXES:
        return stripped
    return next((f"{p}.{wanted}" for p in prefixes if f"{p}.{wanted}" in disk), None)


# the base_model_prefix of the families people adapt
PREFIXES = frozenset(
    (
        "model transformer bert roberta distilbert electra albert deberta camembert xlm_roberta gpt_neox vit deit "
        "beit encoder decoder backbone vision_model text_model language_model bart rwkv mamba longformer mpnet "
        "convbert funnel wav2vec2 hubert whisper clip siglip dinov2 swin segformer esm ernie nezha squeezebert"
    ).split()
)


# model types that transformers loads by the names on disk: its tables, slow to import, have nothing to say about them
PLAIN = frozenset(
    (
        "llama mistral qwen2 qwen3 phi phi3 gemma gemma2 gemma3_text opt gpt2 gptj gpt_bigcode bert roberta "
        "distilbert electra t5 mt5 falcon bloom mpt stablelm starcoder2 olmo olmo2 cohere cohere2 bart whisper"
    ).split()
)


def prefixes(disk: Collection[str]) -> list[str]:
    """The prefixes that the names on disk could carry."""
    return sorted({n.partition(".")[0] for n in disk} & PREFIXES)


def locate(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    sites: Collection[str],
    optional: Collection[str] = (),
) -> dict[str, list[Edge]]:
    """Where each site's parameter lies on disk: {site: edges}.

    sites: module paths, or paths of bare parameters. optional: those that may be missing from the result.
    Raises Mismatch that lists the sites not found and the nearest names on disk.
    """
    known = prefixes(shapes)
    found = {s: [e] for s in sites if (e := _direct_site(s, shapes, known))}
    if lost := [s for s in sites if s not in found]:
        found |= _converted(config, shapes, lost)
    if missing := [s for s in sites if s not in found and s not in optional]:
        raise Mismatch(_not_found(missing, len(sites), shapes), hint="is it made for another base model?")
    return found


def _direct_site(site: str, shapes: Mapping[str, tuple[int, ...]], known: Collection[str]) -> Edge | None:
    for leaf in LEAVES:
        name = f"{site}.{leaf}" if leaf else site
        if disk := direct(name, shapes, known):
            return Edge(parameter=name, disk=disk)
    return None


def _converted(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], lost: Collection[str]
) -> dict[str, list[Edge]]:
    if config.get("model_type") in (None, *PLAIN):
        return {}
    from . import conversions

    candidates = {f"{s}.{leaf}" if leaf else s: s for s in lost for leaf in LEAVES}
    edges = conversions.edges(config, shapes, list(candidates))
    return {candidates[name]: e for name, e in edges.items() if e}


def _not_found(missing: list[str], total: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    # a list of 50,000 names is searched for the few that end alike, or the search would take minutes
    tail = missing[0].rpartition(".")[2]
    alike = [n for n in shapes if tail in n] or list(shapes)
    near = difflib.get_close_matches(missing[0], alike[:2000], 3, cutoff=0.3)
    whole = "none of" if len(missing) == total else f"{len(missing)} of"
    seen = f"; nearest on disk: {some(near)}" if near else f"; on disk: {some(shapes)}"
    return (
        f"{whole} {total} adapted modules {'is in the model' if len(missing) == total else 'are not in the model'} "
        f"(first: {quoted(missing[0])}{seen})"
    )
