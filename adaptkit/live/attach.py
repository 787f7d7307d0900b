"""attach and detach: an adapter onto a live model, and off it again with what it learned."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import fields, replace

from torch import nn

from ..adapter import Adapter, Site
from ..errors import Mismatch, quoted, some
from ..select import Select
from ..store.arrays import load
from ..tuners.base import Tuner
from .adapted import Adapted

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def attach(
    model: nn.Module,
    tuner: Tuner | Adapter,
    select: Select | None = None,
    *,
    name: str = "default",
    freeze: bool = True,
) -> list[str]:
    """Put an adapter on a model: a fresh one from a tuner and a selection, or one that was trained before.

    model: changed in place; the chosen modules are wrapped.    select: which, needed with a tuner.
    name: what to call it.    freeze: let only adapters train; detach gives each parameter its old flag back.

    Returns the module names. Raises Mismatch when nothing is chosen, a module cannot be adapted, or the name is taken.
    """
    if name in {n for m in adapted_modules(model).values() for n in m.tuners}:
        raise Mismatch(
            f"an adapter named {quoted(name)!r} is attached already", hint="detach it, or choose another name"
        )
    sites = _given(model, tuner) if isinstance(tuner, Adapter) else _fresh(model, tuner, select)
    if freeze:
        _freeze(model)
    for path, site in sites.items():
        module = wrapped(model, path)
        module.add(name, site)
        module.active.append(name)
    return list(sites)


def detach(model: nn.Module, name: str = "default") -> Adapter:
    """Take an adapter off a model and return it, trained numbers and all. The model is as it was before.

    Raises Mismatch when no adapter has that name, or its update is merged into the weights at the moment.
    """
    modules = {path: m for path, m in adapted_modules(model).items() if name in m.tuners}
    if not modules:
        there = {n for m in adapted_modules(model).values() for n in m.tuners}
        raise Mismatch(f"no adapter named {quoted(name)!r} is attached; there are: {some(sorted(there)) or 'none'}")
    if inside := [p for p, m in modules.items() if name in m.merged]:
        raise Mismatch(f"{quoted(name)!r} is merged into {some(inside)}", hint="unmerge it first")
    adapter = Adapter(sites={path: m.remove(name) for path, m in modules.items()})
    for path, module in modules.items():
        if not module.tuners:
            _put(model, path, module.base)
    if not adapted_modules(model):
        _thaw(model)
    return adapter


def set_active(model: nn.Module, names: str | Collection[str]) -> None:
    """Choose which attached adapters act, in order. Raises Mismatch for a name that is not attached."""
    names = [names] if isinstance(names, str) else list(names)
    modules = adapted_modules(model).values()
    there = {n for m in modules for n in m.tuners}
    if lost := [n for n in names if n not in there]:
        raise Mismatch(f"no adapter named {some(lost)} is attached; there are: {some(sorted(there)) or 'none'}")
    for module in modules:
        module.active = [n for n in names if n in module.tuners]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it runs without its adapters. What is merged stays merged."""
    modules = list(adapted_modules(model).values())
    before = [m.enabled for m in modules]
    for module in modules:
        module.enabled = False
    try:
        yield model
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The wrapped modules of a model, by the path they had before they were wrapped."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}


def wrapped(model: nn.Module, path: str) -> Adapted:
    """The wrapper at a path, made if it is not there."""
    module = model.get_submodule(path)
    if isinstance(module, Adapted):
        return module
    made = Adapted(module)
    _put(model, path, made)
    return made


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, Adapted) else module


def _fresh(model: nn.Module, tuner: Tuner, select: Select | None) -> dict[str, Site]:
    if select is None:
        raise Mismatch("a selection says which modules a fresh adapter stands on", hint='such as Select(r".*q_proj")')
    inner = {p for p, m in model.named_modules() if isinstance(m, Adapted)}
    names = [p for p, _ in model.named_modules() if p and not any(p.startswith(f"{i}.") for i in inner)]
    chosen = select(names)
    sites = {}
    for path in chosen:
        module = _base(model.get_submodule(path))
        if not adaptable(module):
            raise Mismatch(f"{quoted(path)} is a {type(module).__name__}, which {tuner.name} cannot stand on")
        _called(model, path)
        if getattr(tuner, "dropout", 0) and tuner.name != "lora":
            raise Mismatch(f"{tuner.name} has no dropout here: it changes the weight itself", hint="leave dropout at 0")
        fitted = suited(tuner, module)
        sites[path] = Site(fitted, dict(fitted.init(module)))
    return sites


def _given(model: nn.Module, adapter: Adapter) -> dict[str, Site]:
    import torch

    if adapter.whole or "" in adapter.sites:
        raise Mismatch(
            "replaces tensors or acts on the whole model, which attach does not do", hint="merge it on files"
        )
    sites = {}
    for path, site in adapter.sites.items():
        try:
            module = _base(model.get_submodule(path))
        except AttributeError:
            raise Mismatch(
                f"{quoted(path)} is not a module of this model", hint="is it made for another one?"
            ) from None
        _called(model, path)
        params = {k: torch.as_tensor(load(v, None if k == "index" else "f4")) for k, v in site.params.items()}
        tuner = site.tuner.fit(
            tuple(module.weight.shape), {k: tuple(v.shape) for k, v in params.items()}, turned(module)
        )
        sites[path] = Site(tuner, params)
    return sites


def adaptable(module: nn.Module) -> bool:
    """Whether a tuner can stand on a module: one weight matrix or kernel, used in the ordinary way."""
    kind = type(module).__name__
    # nn.MultiheadAttention reads this one's weight without ever calling it
    return (isinstance(module, PLAIN) and kind != "NonDynamicallyQuantizableLinear") or kind == "Conv1D"


def _called(model: nn.Module, path: str) -> None:
    """Raises Mismatch for a layer whose parent, while not training, reads its weight instead of calling it."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise Mismatch(
            f"{quoted(path)} stands in nn.TransformerEncoderLayer, whose fast path goes around its layers",
            hint="build the encoder of layers that are called",
        )


def turned(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def suited(tuner: Tuner, module: nn.Module) -> Tuner:
    """The tuner, told how the module stores its weight."""
    known = {f.name for f in fields(tuner)}  # type: ignore[arg-type]
    told = {"transposed": turned(module), "embedding": isinstance(module, nn.Embedding)}
    return replace(tuner, **{k: v for k, v in told.items() if k in known})  # type: ignore[type-var]


FLAG = "_adaptkit_trained"


def _freeze(model: nn.Module) -> None:
    """Note each parameter's flag and clear it; parameters of adapters that stand already keep theirs."""
    ours = {id(p) for m in model.modules() if isinstance(m, Adapted) for p in m.params.parameters()}
    for p in model.parameters():
        if id(p) not in ours and not hasattr(p, FLAG):
            setattr(p, FLAG, p.requires_grad)
            p.requires_grad_(False)


def _thaw(model: nn.Module) -> None:
    for p in model.parameters():
        if hasattr(p, FLAG):
            p.requires_grad_(getattr(p, FLAG))
            delattr(p, FLAG)
