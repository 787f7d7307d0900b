"""An adapter's tensors under PEFT's names: base_model.model.<module>.lora_A.weight and so on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ..live import loose
from ..live.attach import bare, unwrapped
from ..live.replaced import Replaced
from . import heads
from .tuner import TunerModel
from .tuners.slots import Slotted


class LoadResult(NamedTuple):
    """What did not find its other half."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Part(NamedTuple):
    """One tensor: its name in a file, its name in the model's state dict, and itself."""

    name: str
    ours: str
    value: nn.Parameter


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter.

    state_dict: take the values from here, as the model's own state_dict() names them.
    save_embedding_layers: True adds the model's embedding and output head; "auto" does not.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    if prompts := model.__dict__.get("_prompts"):
        return prompts.tensors(adapter_name) if state_dict is None else prompts.tensors_of(adapter_name, state_dict)
    found = {}
    for part in [*parts(model, adapter_name), *(ends(model) if save_embedding_layers is True else ())]:
        if state_dict is not None and part.ours not in state_dict:
            raise Mismatch(f"the state dict has no {quoted(part.ours)}", hint="give the model's own state_dict()")
        value = part.value if state_dict is None else state_dict[part.ours]
        found[part.name] = value.detach()
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors into an adapter, in place; what is missing or left over is returned, and warned of."""
    if prompts := model.__dict__.get("_prompts"):
        return _reported(LoadResult(*prompts.set_tensors(adapter_name, peft_model_state_dict)))
    wanted = {p.name: p for p in parts(model, adapter_name)}
    fitting = {}
    for name, part in wanted.items():
        given = peft_model_state_dict.get(name)
        if given is not None and given.shape == part.value.shape:
            fitting[name] = given
        elif given is not None and not ignore_mismatched_sizes:
            raise Mismatch(f"{quoted(name)} is {list(given.shape)}, the model has {list(part.value.shape)}")
    with torch.no_grad():
        for name, given in fitting.items():
            wanted[name].value.copy_(given)
    left = [n for n in peft_model_state_dict if n not in wanted]
    return _reported(LoadResult([n for n in wanted if n not in fitting], left))


def _reported(result: LoadResult) -> LoadResult:
    for names, what in ((result.missing_keys, "not loaded"), (result.unexpected_keys, "not used")):
        if names:
            warnings.warn(f"{len(names)} tensors were {what}: {some(names)}", AdaptKitWarning, stacklevel=3)
    return result


def ends(model: nn.Module) -> Iterator[Part]:
    """The weights of the embedding and of the output head, where they are no copies of an adapter's own."""
    tuner, prefix = _rooted(model)
    paths = {id(module): path for path, module in tuner.model.named_modules()}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(tuner.model, get)() if hasattr(tuner.model, get) else None
        if layer is None or isinstance(layer, Replaced):
            continue
        path = paths[id(bare(layer))]
        for leaf, value in bare(layer).named_parameters(recurse=False):
            yield Part(f"base_model.model.{path}.{leaf}", f"{prefix}{path}.{leaf}", value)


def _rooted(model: nn.Module) -> tuple[TunerModel, str]:
    """The tuner model, and what precedes the names of the base model's tensors."""
    if isinstance(model, TunerModel):
        return model, "model."
    if not isinstance(getattr(model, "base_model", None), TunerModel):
        raise Usage(f"the model is a {type(model).__name__}, which carries no adapter of adaptkit.peft")
    return model.base_model, "base_model.model."


def parts(model: nn.Module, adapter_name: str) -> Iterator[Part]:
    """Every tensor of one adapter. Raises Mismatch when the model has no such adapter."""
    tuner, prefix = _rooted(model)
    tuner.known([adapter_name])
    saved = prefix
    biases = loose.of(tuner.model)[adapter_name].aside if adapter_name in loose.of(tuner.model) else {}
    paths = {id(module): path for path, module in tuner.model.named_modules()}
    for path, module in tuner.model.named_modules():
        if isinstance(module, Slotted) and adapter_name in module.tuners:
            for here, there, value in module.entries(adapter_name):
                yield Part(f"{saved}{path}.{there}", f"{prefix}{path}.{here}", value)
    for here, there, value in heads.entries(tuner.model, adapter_name):
        yield Part(saved + there, prefix + here, value)
    modules = unwrapped(tuner.model)
    for bias in biases:
        parent, _, leaf = bias.rpartition(".")
        path = f"{paths[id(modules[parent])]}.{leaf}"
        yield Part(saved + path, prefix + path, tuner.model.get_parameter(path))
