"""Slots: places in a graph that a LoRA or (IA)^3 is put into while it runs, as inputs with a default that does nothing.

LoRA     y = W x + (x A) B     A: (in, r)  <module>.lora_A.weight   B: (r, out)  <module>.lora_B.weight   default r = 0
(IA)^3   y = o * W (i * x)     i: (in,)    <module>.ia3_in          o: (out,)    <module>.ia3_out         default 1

The scale is in B, as Olive and ONNX Runtime GenAI have it: https://onnxruntime.ai/docs/genai/tutorials/finetune.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..adapter import Adapter, Site
from ..errors import Mismatch, quoted, some
from ..live.attach import is_read, place, turned, unwrapped
from ..store.arrays import load, shape_of
from ..tuners.base import Params, Tuner

A, B, IN, OUT = "lora_A.weight", "lora_B.weight", "ia3_in", "ia3_out"
RANKED = {A: 1, B: 0}  # which dimension has any size
MERGE = "export it alone, without --swappable, which merges it"
ALONE = "export it alone, without --swappable"
Numbers = dict[str, np.ndarray]
Shapes = dict[str, tuple[int | None, ...]]


def filled(model: nn.Module, adapter: Adapter) -> Numbers:
    """What an adapter puts into the slots of a model, by the names of the inputs; to be rounded once, when it is written.

    Raises Mismatch for what slots cannot hold, and for what does not fit the model.
    """
    only_weights(adapter)
    modules = unwrapped(model)
    found: Numbers = {}
    for path, site in adapter.sites.items():
        found |= {f"{path}.{leaf}": value for leaf, value in _of(modules, path, site).items()}
    if not found:
        raise Mismatch("adapts nothing")
    return found


def union(adapters: Sequence[Numbers]) -> Shapes:
    """The inputs of a graph that takes each of these adapters: names and shapes, None where any size goes."""
    found: Shapes = {}
    for numbers in adapters:
        for name, value in numbers.items():
            found[name] = tuple(None if i == rank_of(name) else n for i, n in enumerate(value.shape))
    return found


def rank_of(name: str) -> int | None:
    """Which dimension of an input is a rank."""
    return next((i for leaf, i in RANKED.items() if name.endswith(f".{leaf}")), None)


def site_of(name: str) -> str:
    """The module whose slot an input is."""
    return next(name.removesuffix(f".{leaf}") for leaf in (A, B, IN, OUT) if name.endswith(f".{leaf}"))


def idle(name: str, shape: Sequence[int | None], rank: int = 0) -> np.ndarray:
    """A value that changes nothing: factors of rank 0, or ones.    rank: another one for the sample of tracing."""
    if rank_of(name) is None:
        return np.ones(tuple(shape), "f4")
    return np.zeros([rank if n is None else n for n in shape], "f4")


def only_weights(adapter: Adapter) -> None:
    """Raises Mismatch for an adapter that is more than factors to add, whatever the model."""
    if "" in adapter.sites:
        kind = adapter.sites[""].tuner.name
        raise Mismatch(f"holds virtual tokens ({quoted(kind)}), which are built into a graph", hint=ALONE)
    if adapter.whole:
        what = f"replaces {some(adapter.whole)} (modules_to_save, or trained biases), which no slot holds"
        raise Mismatch(what, hint=MERGE)
    for path, site in adapter.sites.items():
        if site.tuner.name != "ia3":
            _product(path, site.tuner, {k: load(v) for k, v in site.params.items()})


def _product(path: str, tuner: Tuner, params: Params) -> tuple[np.ndarray, np.ndarray, float]:
    """L, R and s of a tuner that adds s L R. Raises Mismatch for one that does something else."""
    thin = tuner.factors(params)
    if thin is None:
        raise Mismatch(f"{quoted(path)} has a {tuner.name}, which is no plain product to add", hint=MERGE)
    if tuner.changes_bias(params):
        raise Mismatch(f"{quoted(path)} has a trained bias, which no slot holds", hint=MERGE)
    return thin


def _of(modules: Mapping[str, nn.Module], path: str, site: Site) -> Numbers:
    module = _slotted(modules, path, site)
    shapes = {k: shape_of(v) for k, v in site.params.items()}
    try:
        tuner = site.tuner.fit(tuple(module.weight.shape), shapes, turned(module))
    except Mismatch as e:
        raise Mismatch(f"{quoted(path)}: {e.message}", hint=e.hint) from None
    params = {k: load(v, np.dtype("f8")) for k, v in site.params.items()}
    if tuner.name == "ia3":
        return {IN if tuner.feedforward else OUT: params["l"].reshape(-1)}
    L, R, scale = _product(path, tuner, params)
    into, out = (L, R) if turned(module) else (R.T, L.T)  # (in, r), (r, out)
    return {A: np.ascontiguousarray(into), B: np.ascontiguousarray(scale * out)}


def _slotted(modules: Mapping[str, nn.Module], path: str, site: Site) -> nn.Module:
    """The module of a site. Raises Mismatch for one that is no matrix of its own."""
    try:
        at, parameter = place(modules, path)
    except Mismatch:
        text = f"{quoted(path)} is no module of this model under that name, so it has no slot"
        raise Mismatch(text, hint=f"{MERGE} and knows older names") from None
    module, kind = modules[at], type(modules[at]).__name__
    if parameter == "weight" and not is_read(module) and (isinstance(module, nn.Linear) or kind == "Conv1D"):
        return module
    if isinstance(module, nn.Embedding):
        kind = "embedding"
    what = f"the parameter {quoted(parameter)} of {kind}" if parameter != "weight" else f"a module of kind {kind}"
    raise Mismatch(f"{quoted(path)} is {what}, which has no slot for {site.tuner.name}", hint=MERGE)
