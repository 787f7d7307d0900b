"""An adapter's tensors under PEFT's names: base_model.model.<module>.lora_A.weight and so on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdaptKitWarning, Mismatch, quoted, some
from ..live.adapted import Adapted, key
from ..live.attach import adapted_modules
from .tuner import TunerModel

NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "l": "ia3_l"}
IN_EMBEDDINGS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


class LoadResult(NamedTuple):
    """What did not find its other half."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Part(NamedTuple):
    """One tensor: PEFT's name and shape for it, ours in a state dict, and the parameter."""

    name: str
    shape: tuple[int, ...]
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
    save_embedding_layers: base embeddings are never added, so True is refused.
    """
    if save_embedding_layers is True:
        raise Mismatch("save_embedding_layers=True is not there yet")
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    found = {}
    for part in parts(model, adapter_name):
        if state_dict is not None and part.ours not in state_dict:
            raise Mismatch(f"the state dict has no {quoted(part.ours)}", hint="give the model's own state_dict()")
        value = part.value if state_dict is None else state_dict[part.ours]
        found[part.name] = value.detach().reshape(part.shape)
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors into an adapter, in place; what is missing or left over is returned, and warned of."""
    wanted = {p.name: p for p in parts(model, adapter_name)}
    fitting = {}
    for name, part in wanted.items():
        given = peft_model_state_dict.get(name)
        if given is not None and tuple(given.shape) == part.shape:
            fitting[name] = given
        elif given is not None and not ignore_mismatched_sizes:
            raise Mismatch(f"{quoted(name)} is {list(given.shape)}, the model has {list(part.shape)}")
    with torch.no_grad():
        for name, given in fitting.items():
            wanted[name].value.copy_(given.reshape(wanted[name].value.shape))
    result = LoadResult([n for n in wanted if n not in fitting], [n for n in peft_model_state_dict if n not in wanted])
    for names, what in ((result.missing_keys, "not loaded"), (result.unexpected_keys, "not used")):
        if names:
            warnings.warn(f"{len(names)} tensors were {what}: {some(names)}", AdaptKitWarning, stacklevel=2)
    return result


def parts(model: nn.Module, adapter_name: str) -> Iterator[Part]:
    """Every tensor of one adapter. Raises Mismatch when the model has no such adapter."""
    tuner, prefix = (model, "model.") if isinstance(model, TunerModel) else (model.base_model, "base_model.model.")
    tuner.known([adapter_name])
    for path, module in adapted_modules(tuner.model).items():
        if adapter_name in module.tuners:
            yield from _of_module(f"{prefix}{path}", module, adapter_name)


def _of_module(path: str, module: Adapted, name: str) -> Iterator[Part]:
    names = NAMES | IN_EMBEDDINGS if isinstance(module.base, nn.Embedding) else NAMES
    for letter, value in module.of(name).items():
        shape = _shape(letter, value, module, name)
        yield Part(f"{path}.{names[letter]}", shape, f"{path}.params.{key(name)}.{letter}", value)


def _shape(letter: str, value: Any, module: Adapted, name: str) -> tuple[int, ...]:
    """PEFT's shape: vectors of convolutions have the kernel's dimensions, IA3's say their side."""
    n, ndim = value.numel(), module.base.weight.ndim
    if letter in "AB":
        return tuple(value.shape)
    if ndim > 2:
        return (1, n, *[1] * (ndim - 2))
    if letter == "m":
        return (n,)
    return (1, n) if module.tuners[name].feedforward else (n, 1)
