"""A live module, lent for an export: put into its running state, adapters merged, and given back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .. import live
from ..adapter import Adapter
from ..errors import Mismatch, Usage, some
from ..live.tokens import meant, standing
from .task import Task, own_task

NAME = "adaptkit_export_{}"


def config_of(model: Any) -> dict[str, Any]:
    """The settings of a live model. Raises Usage for what is none."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise Usage(f"a {type(model).__name__} is not a model of transformers", where="MODEL", hint="give a folder")
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    return config


def dtype_of(model: nn.Module, asked: str | None) -> str:
    """The dtype of a live model. Raises Usage when another one was asked for, Mismatch when it has several, or no numbers."""
    if away := [n for n, p in model.named_parameters() if p.is_meta]:
        raise Mismatch(f"the model has no numbers for {some(away)} (meta tensors)", where="MODEL", hint="load it first")
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        raise Mismatch(f"the model's numbers are of several kinds ({', '.join(sorted(dtypes))})", hint="cast it to one")
    found = dtypes.pop()
    if asked and asked != found:
        raise Usage(
            f"the live model is {found}, not {asked}", where="--dtype", hint="cast the model, or export its folder"
        )
    return found


def suited(model: nn.Module, task: Task) -> None:
    """Raises Mismatch for a live model that is made for something else, or cannot be seen into: its head is what it is."""
    kind, own = type(model).__name__, own_task(config_of(model))
    if type(model).__module__.partition(".")[0] == "peft" and task.kind != "encoder":
        hint = "export its base with the adapter's folder, or call merge_and_unload() first"
        raise Mismatch(f"a {kind} of PEFT hides what its model reads", where="MODEL", hint=hint)
    if own is not None and own is not task:
        raise Mismatch(
            f"a {kind} is made for {own.name}", where=f"--task {task.name}", hint="leave it out, or load another class"
        )


@contextlib.contextmanager
def lent(model: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float] | None) -> Iterator[nn.Module]:
    """The model as it runs, with what stands on it and these adapters merged; afterwards as it was, bit for bit.

    Virtual tokens act on it, those given in the place of others. Raises Mismatch for weights other than 1, or an
    adapter that does not fit.
    """
    if any(w != 1 for w in weights or ()):
        raise Mismatch("a live model takes adapters whole", where="--weights", hint="export its folder")
    if merged := [p for p, m in live.adapted_modules(model).items() if m.merged_adapters]:
        raise Mismatch(f"an adapter is merged into {some(merged)} at the moment", hint="unmerge it first, or absorb it")
    training = {m: m.training for m in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    tuples = [c for c in configs.values() if getattr(c, "return_dict", None) is False]
    put: list[str] = []
    mixed, acted = False, list(here.active) if (here := standing(model)) else []
    try:
        for config in tuples:
            config.return_dict = True  # outputs are found by their names
        with _aside(model):
            for i, adapter in enumerate(a for a in adapters if not meant(a)):
                live.attach(model, adapter, name=NAME.format(i))
                put.append(NAME.format(i))
            mixed = bool(live.attached(model)) and bool(live.merge(model, keep=True))
        for adapter in filter(meant, adapters):
            live.attach(model, adapter, name=NAME.format("virtual"))
            put.append(NAME.format("virtual"))
        model.eval()
        yield model
    finally:
        _give_back(model, put, mixed)
        if here := standing(model):
            here.active = acted
        for module, flag in training.items():
            module.training = flag
        for config in tuples:
            config.return_dict = False


def _give_back(model: nn.Module, put: list[str], merged: bool) -> None:
    with _aside(model):
        if merged:
            live.unmerge(model)
    for name in reversed(put):
        live.detach(model, name)


@contextlib.contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Without virtual tokens, which cannot be merged."""
    here = standing(model)
    before = list(here.active) if here else []
    if here:
        here.active = []
    try:
        yield
    finally:
        if here:
            here.active = before
