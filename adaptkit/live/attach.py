"""attach and detach: an adapter onto a live model, and off it again with what it learned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace

import torch
from torch import nn

from ..adapter import Adapter, Site
from ..errors import Mismatch, Usage, quoted, some
from ..select import Select
from ..store.arrays import load
from ..tuners.base import Tuner
from ..tuners.experts import LAYOUT, is_turned
from . import loose, tokens
from .adapted import Adapted, Read
from .replaced import Replaced
from .tied import Tied, other_end
from .wrapper import Wrapper

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
INTEGERS = {"index"}  # params that are no floats
Wrap = Callable[[nn.Module, str, Site], Adapted]


def attach(
    model: nn.Module,
    tuner: Tuner | Adapter,
    select: Select | None = None,
    *,
    name: str = "default",
    freeze: bool = True,
    wrap: Wrap | None = None,
    copy: bool = True,
) -> list[str]:
    """Put an adapter on a model: a fresh one from a tuner and a selection, or one that was trained before.

    model: changed in place; the chosen modules are wrapped.    select: which, needed with a tuner.
    name: what to call it.    freeze: let only adapters train; detach gives each parameter its old flag back.
    copy: train copies of a given adapter's numbers, not the numbers themselves where that is possible.
    wrap: makes a wrapper, of a module, the name of its adapted parameter and the site.

    Returns the module names. Raises Mismatch when nothing is chosen, a module cannot be adapted, or the name is taken; the model is then as it was.
    """
    _free(model, name)
    if tokens.meant(tuner):
        tokens.stand(model, tuner, name)
        if freeze:
            _freeze(model)
        return [""]
    adapter = tuner if isinstance(tuner, Adapter) else Adapter(_fresh(model, tuner, select))
    sites = _given(model, adapter) if adapter is tuner else adapter.sites
    if freeze:
        _freeze(model)
    try:
        for path, module in around(model, sites, wrap).items():
            module.add(name, sites[path], copy and adapter is tuner)
            module.active.append(name)
            if sites[path].tuner.of_rows:
                _tie(model, module)
        _rows_alone(model)
        if adapter.whole:
            loose.replace(model, name, {p: torch.as_tensor(load(v)) for p, v in adapter.whole.items()})
    except BaseException:
        _off(model, name)
        raise
    return list(sites)


def checked_module(model: object) -> None:
    """Raises Usage for what is no model."""
    if not isinstance(model, nn.Module):
        raise Usage(f"the model is a {type(model).__name__}, which is no torch module")


def _free(model: nn.Module, name: str) -> None:
    """Raises Usage or Mismatch for what is no model, and what cannot be a new adapter's name."""
    checked_module(model)
    if not isinstance(name, str):
        raise Usage(f"an adapter's name is a string, not {quoted(name)}")
    if name in attached(model):
        raise Mismatch(
            f"an adapter named {quoted(name)!r} is attached already", hint="detach it, or choose another name"
        )


def detach(model: nn.Module, name: str = "default") -> Adapter:
    """Take an adapter off a model and return it, trained numbers and all. The model is as it was before.

    Raises Mismatch when no adapter has that name, or its update is merged into the weights at the moment.
    """
    if name not in attached(model):
        there = some(sorted(attached(model))) or "none"
        raise Mismatch(f"no adapter named {quoted(name)!r} is attached; there are: {there}")
    if (here := tokens.standing(model)) and name in here.names():
        adapter = tokens.leave(model, name)
        if not attached(model):
            thaw(model)
        return adapter
    if inside := [p for p, m in adapted_modules(model).items() if name in m.merged_adapters]:
        raise Mismatch(f"{quoted(name)!r} is merged into {some(inside)}", hint="unmerge it first")
    return _off(model, name)


def _off(model: nn.Module, name: str) -> Adapter:
    """Take off what is there of an adapter in weights."""
    modules = {path: m for path, m in adapted_modules(model).items() if name in m.tuners}
    about = packed(modules, name)
    sites = {path: m.remove(name) for path, m in modules.items()}
    adapter = Adapter(sites=sites, whole=dict(loose.take(model, name)), about=about)
    there = [m for m in wrappers(model) if isinstance(m, Adapted)]
    for module in there:
        module.active = [n for n in module.active if n in module.tuners]
    _drop(model, [m for m in there if not m.tuners])
    if not attached(model):
        thaw(model)
    return adapter


def _tie(model: nn.Module, module: Adapted) -> None:
    """Let the other end of a tied matrix see the rows that are trained."""
    head = other_end(model, module.bare())
    ends = [w for w in wrappers(model) if isinstance(w, Tied) and w.other is module]
    if head is not None and not ends:
        ends = [Tied(head, module)]
        Homes(model).put(head, ends[0])
    for end in ends:
        end.active = list(module.active)


def _rows_alone(model: nn.Module) -> None:
    """Raises Mismatch where rows of a tied matrix are trained and one of its ends is changed in another way."""
    for path, around, _ in tree(model):
        for end in (w for w in around if isinstance(w, Tied)):
            if len(around) > 1 or not all(t.of_rows for t in end.tuners.values()):
                raise Mismatch(
                    f"{quoted(path)} is tied to an embedding of which rows are trained, so nothing else can change them",
                    hint="do one or the other",
                )


def _drop(model: nn.Module, empty: Collection[Adapted]) -> None:
    """Take wrappers off again."""
    homes = Homes(model) if empty else None
    for module in empty:
        homes.put(module, module.base_layer)


def attached(model: nn.Module) -> set[str]:
    """The names of the adapters on a model."""
    return {n for m in carriers(model) for n in m.names()} | set(loose.of(model))


def set_active(model: nn.Module, names: str | Collection[str]) -> None:
    """Choose which attached adapters act, in order. Raises Mismatch for a name that is not attached."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    there = attached(model)
    if lost := [n for n in names if n not in there]:
        raise Mismatch(f"no adapter named {some(lost)} is attached; there are: {some(sorted(there)) or 'none'}")
    for module in carriers(model):
        module.active = [n for n in names if n in module.names()]
    loose.act(model, names)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it runs without its adapters. What is merged stays merged."""
    modules = carriers(model)
    before, acted = [m.enabled for m in modules], loose.acting(model)
    enable(model, False)
    try:
        yield model
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
        loose.act(model, acted)


def enable(model: nn.Module, enabled: bool, active: Collection[str] = ()) -> None:
    """Let the active adapters act, or none.    active: names whose outright replacements act."""
    for module in carriers(model):
        module.enabled = enabled
    loose.act(model, active if enabled else ())


@contextlib.contextmanager
def by_rows(
    model: nn.Module, names: Collection[str], *, repeated: bool = False, base: str = "__base__"
) -> Iterator[nn.Module]:
    """Inside, each sample of a batch runs with its own adapter.

    names: one for each sample; `base` means none.    repeated: a batch may hold each sample several times, as beams do.
    Raises Mismatch for a name that is not attached, and where an adapter is merged or replaces tensors.
    """
    if isinstance(names, str) or not names:
        raise Usage("adapter_names is a list of names, one for each sample")
    there = attached(model)
    if lost := sorted({n for n in names if n != base} - there):
        raise Mismatch(f"no adapter named {some(lost)} is attached; there are: {some(sorted(there)) or 'none'}")
    if len(set(names)) > 1 and (whole := sorted(set(loose.of(model)) & {*names, *loose.acting(model)})):
        raise Mismatch(f"{some(whole)} replaces tensors of the model, which cannot differ in a batch")
    if (here := tokens.standing(model)) and here.active:
        raise Mismatch("virtual tokens are active, which cannot differ in a batch", hint="set_active without them")
    modules = wrappers(model)
    if merged := sorted({n for m in modules for n in m.merged_adapters}):
        raise Mismatch(f"{some(merged)} is merged into the weights", hint="unmerge it first")
    for module in modules:
        module.rows, module.repeated = list(names), repeated
    try:
        yield model
    finally:
        for module in modules:
            module.rows = None


def tree(model: nn.Module) -> Iterator[tuple[str, list[Wrapper], nn.Module]]:
    """Every module once, as if none were wrapped: its path, the wrappers around it from outside in, and itself."""
    seen: set[int] = set()
    open_: list[tuple[str, nn.Module]] = [("", model)]
    while open_:
        path, module = open_.pop()
        around = []
        while isinstance(module, Wrapper):
            around.append(module)
            module = module.base_layer if isinstance(module, Adapted) else module.bare()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, around, module
        inner = [
            (f"{path}.{leaf}" if path else leaf, m)
            for leaf, m in module._modules.items()
            if m is not None and not isinstance(m, tokens.Standing)
        ]
        open_ += reversed(inner)


def wrappers(model: nn.Module) -> list[Wrapper]:
    """The wrappers of a model."""
    return [wrapper for _, around, _ in tree(model) for wrapper in around]


def carriers(model: nn.Module) -> list[Wrapper | tokens.Standing]:
    """All that carries adapters: the wrappers, and the virtual tokens of the model itself."""
    here = tokens.standing(model)
    return [*wrappers(model), *([here] if here else [])]


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The adapted modules of a model, by the path they had before they were wrapped; of a bare parameter, its path."""
    return {
        _site(path, w): w
        for path, around, _ in tree(model)
        for w in around
        if isinstance(w, Adapted) and not isinstance(w, Tied)
    }


def _site(path: str, module: Adapted) -> str:
    whole = module.parameter == "in_proj_weight" or not module.inside
    return path if whole else f"{path}.{module.parameter}"


def unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path, as if none were wrapped."""
    return {path: module for path, _, module in tree(model)}


def bare(module: nn.Module) -> nn.Module:
    """The module without the adapters around it."""
    return module.bare() if isinstance(module, Wrapper) else module


def place(modules: Mapping[str, nn.Module], path: str) -> tuple[str, str]:
    """The module and the parameter that a site's path means. Raises Mismatch when the model has neither."""
    if path in modules:
        return path, "in_proj_weight" if isinstance(modules[path], nn.MultiheadAttention) else "weight"
    parent, _, leaf = path.rpartition(".")
    if parent in modules and isinstance(modules[parent]._parameters.get(leaf), nn.Parameter):
        return parent, leaf
    raise Mismatch(f"{quoted(path)} is not a module of this model", hint="is it made for another one?")


class Homes:
    """Where modules stand: a module that stands in several places is replaced in all of them."""

    def __init__(self, model: nn.Module):
        self.of: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for leaf, child in parent._modules.items():
                self.of.setdefault(id(child), []).append((parent, leaf))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another one. Raises Mismatch for the model itself."""
        places = [home for home in self.of.get(id(old), ()) if home[0] is not new]
        if not places:
            raise Mismatch("the model itself cannot be wrapped", hint="choose modules inside it")
        for parent, leaf in places:
            parent._modules[leaf] = new
        self.of[id(new)] = places
        self.of[id(old)] = [(parent, leaf) for parent, leaf in self.of[id(old)] if parent is new]


def around(model: nn.Module, sites: Mapping[str, Site], wrap: Wrap | None = None) -> dict[str, Adapted]:
    """The wrapper at each site's path, made where there is none."""
    modules, homes, there = unwrapped(model), Homes(model), adapted_modules(model)
    outer: dict[int, nn.Module] = {id(module): ws[0] for _, ws, module in tree(model) if ws}
    found = {}
    for path, site in sites.items():
        if path not in there:
            at, parameter = place(modules, path)
            module = outer.get(id(modules[at]), modules[at])
            if isinstance(module, Replaced):
                raise Mismatch(f"{quoted(path)} is trained as a whole already", hint="do one or the other")
            made = outer[id(modules[at])] = there[path] = (wrap or _wrap)(module, parameter, site)
            homes.put(module, made)
        found[path] = there[path]
    return found


def _wrap(module: nn.Module, parameter: str, site: Site) -> Adapted:
    return (Read if is_read(module) else Adapted)(module, parameter)


def _fresh(model: nn.Module, tuner: Tuner, select: Select | None) -> dict[str, Site]:
    if not isinstance(tuner, Tuner):
        raise Usage(f"the tuner is a {type(tuner).__name__}; give a tuner such as LoRA(r=8), or an Adapter")
    if not callable(select):
        raise Mismatch("a selection says which modules a fresh adapter stands on", hint='such as Select(r".*q_proj")')
    modules = unwrapped(model)
    sites = {}
    for path in select([p for p in modules if p]):
        module = modules[path]
        if not adaptable(module):
            raise Mismatch(f"{quoted(path)} is a {type(module).__name__}, which {tuner.name} cannot stand on")
        _called(path, modules)
        fitted = suited(tuner, module)
        sites[path] = Site(fitted, dict(fitted.init(module)))
    return sites


def _given(model: nn.Module, adapter: Adapter) -> dict[str, Site]:
    if "" in adapter.sites:
        raise Mismatch("acts on the whole model, which attach does not do")
    modules = unwrapped(model)
    sites = {}
    for path, site in adapter.sites.items():
        at, parameter = place(modules, path)
        _called(at, modules)
        module = modules[at]
        params = {k: torch.as_tensor(load(v, None if k in INTEGERS else "f4")) for k, v in site.params.items()}
        shape = tuple(getattr(module, parameter).shape)
        square = _turned_stack(module, adapter) if site.tuner.name == "experts" else turned(module)
        tuner = site.tuner.fit(shape, {k: tuple(v.shape) for k, v in params.items()}, square)
        sites[path] = Site(tuner, {**tuner.start(module), **params})
    return sites


def adaptable(module: nn.Module) -> bool:
    """Whether a fresh adapter can stand on a module: one weight matrix or kernel, used in the ordinary way."""
    kind = type(module).__name__
    return (isinstance(module, PLAIN) and not is_read(module)) or kind == "Conv1D"


def is_read(module: nn.Module) -> bool:
    """Whether a module's weight is read without the module being called, as in nn.MultiheadAttention."""
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def _called(path: str, modules: dict[str, nn.Module]) -> None:
    """Raises Mismatch for a layer whose parent, while not training, reads its weight instead of calling it."""
    if isinstance(modules.get(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise Mismatch(
            f"{quoted(path)} stands in nn.TransformerEncoderLayer, whose fast path goes around its layers",
            hint="build the encoder of layers that are called",
        )


def turned(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def _turned_stack(module: nn.Module, adapter: Adapter) -> bool:
    """Whether a square stack of experts, or a bare square matrix, is (in, out) for an adapter."""
    return is_turned(str(adapter.about.get("peft_version") or ""), getattr(module, "is_transposed", False))


def packed(modules: Mapping[str, Adapted], name: str) -> dict[str, str]:
    """How an adapter packs stacks of experts, as a version of PEFT that does it so: of square ones no shape tells it."""
    stacks = [(m.bare(), m.tuners[name]) for m in modules.values() if m.tuners[name].name == "experts"]
    alike = all(t.transposed == getattr(m, "is_transposed", False) for m, t in stacks)
    return {"peft_version": LAYOUT} if stacks and alike else {}


def suited(tuner: Tuner, module: nn.Module) -> Tuner:
    """The tuner, told how the module stores its weight."""
    known = {f.name for f in fields(tuner)}  # type: ignore[arg-type]
    told = {"transposed": turned(module), "embedding": isinstance(module, nn.Embedding)}
    return replace(tuner, **{k: v for k, v in told.items() if k in known})  # type: ignore[type-var]


FLAGS = "_adaptkit_trained"  # on a module, so that copies of the model keep them
PLACES = "_adaptkit_trained_at"  # on the model, for modules that are put in the place of noted ones, as resizing does


def _freeze(model: nn.Module) -> None:
    """Note the flag of each parameter and clear it; those noted before keep theirs, and so do adapters'."""
    fresh = [(path, m, leaf, p) for path, m, leaf, p in _parameters(model) if leaf not in m.__dict__.get(FLAGS, ())]
    places = model.__dict__.setdefault(PLACES, {})
    for path, module, leaf, p in fresh:
        module.__dict__.setdefault(FLAGS, {})[leaf] = places.setdefault((path, leaf), p.requires_grad)
    for _, _, _, p in fresh:
        p.requires_grad_(False)


def _parameters(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """The model's own parameters, and where they stand."""
    return [(path, m, leaf, p) for path, _, m in tree(model) for leaf, p in m._parameters.items() if p is not None]


def thaw(model: nn.Module) -> None:
    """Give parameters their flags back. One that was noted twice, by two modules, was frozen the second time."""
    trained: dict[nn.Parameter, bool] = {}
    places = model.__dict__.pop(PLACES, {})
    for path, module, leaf, p in _parameters(model):
        flag = module.__dict__.get(FLAGS, {}).get(leaf, places.get((path, leaf)))
        if flag is not None:
            trained[p] = trained.get(p, False) or flag
    for p, flag in trained.items():
        p.requires_grad_(flag)
    for module in model.modules():
        module.__dict__.pop(FLAGS, None)
