"""From settings to sites: which modules of a model, and the fresh numbers for each."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, Site
from ..errors import AdaptKitWarning, Mismatch, quoted, some
from ..formats.peft.patterns import lookup, unmatched
from ..live.adapted import Adapted
from ..live.attach import PLAIN, adaptable, suited, turned
from ..select import Select, matching
from ..tuners.dora import DoRA, norms
from ..tuners.ia3 import IA3
from ..tuners.lora import LoRA
from . import defaults
from .config import STARTS, IA3Config, LoraConfig, PeftConfig

FORWARDS = {kind.forward for kind in PLAIN}


def resolved(model: nn.Module, config: PeftConfig) -> list[str]:
    """The modules that the settings choose, in the model's order; fills in what the settings leave to the model."""
    modules = unwrapped(model)
    names = [p for p in modules if p]
    given = config.target_modules
    if given is None:
        _by_default(model, config)
    elif isinstance(given, str) and given.lower() == "all-linear":
        config.target_modules = set(_all_linear(model))
    chosen = _selection(config)(names)
    _unused(given, config.exclude_modules, names)
    config.fan_in_fan_out = any(type(modules[p]).__name__ == "Conv1D" for p in chosen)
    return chosen


def fresh(model: nn.Module, config: PeftConfig, chosen: list[str]) -> Adapter:
    """Numbers to start from, for each module chosen."""
    modules = unwrapped(model)
    started = _ia3 if isinstance(config, IA3Config) else _lora
    if isinstance(config, LoraConfig):
        if config.init_lora_weights not in STARTS:
            raise Mismatch(f"init_lora_weights={config.init_lora_weights!r} cannot be started from yet")
        unmatched(asdict(config), chosen)
    return Adapter(sites={p: started(config, p, checked(p, modules)) for p in chosen})


def unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path, as if none were wrapped."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            inside |= {id(m) for m in module.modules()}
            found[path] = module.base
        elif id(module) not in inside:
            found[path] = module
    return found


def _by_default(model: nn.Module, config: PeftConfig) -> None:
    if isinstance(config, IA3Config):
        targets, feedforward = defaults.of_model(defaults.IA3, model)
        config.target_modules = set(targets)
        if config.feedforward_modules is None:
            config.feedforward_modules = set(feedforward)
    else:
        config.target_modules = set(defaults.of_model(defaults.LORA, model))


def _all_linear(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = head.base if isinstance(head, Adapted) else head
    return [
        p
        for p, m in unwrapped(model).items()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and m is not head
    ]


def _selection(config: PeftConfig) -> Select:
    layers = getattr(config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers
    targets = config.target_modules
    which = {"pattern": targets} if isinstance(targets, str) else {"names": targets}
    pattern = getattr(config, "layers_pattern", None)
    return Select(**which, layers=layers, layers_pattern=pattern, exclude=config.exclude_modules)


def _unused(targets: Any, exclude: Any, names: list[str]) -> None:
    for field, rule in (("target_modules", targets), ("exclude_modules", exclude)):
        if lost := [e for e in sorted(rule if isinstance(rule, set) else ()) if not matching([e], names)]:
            warnings.warn(f"{field}: no module is called {some(lost)}", AdaptKitWarning, stacklevel=4)


def checked(path: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The module, if an adapter beside it computes what one inside its weight would. Raises Mismatch with the reason."""
    module, kind = modules[path], type(modules[path]).__name__
    if isinstance(modules.get(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise Mismatch(f"{quoted(path)} stands in nn.TransformerEncoderLayer, whose fast path goes around its layers")
    if not adaptable(module):
        raise Mismatch(f"{quoted(path)} is a {kind}, on which no adapter can stand")
    if not module.weight.is_floating_point() or module.weight.dtype.itemsize < 2:
        raise Mismatch(f"{quoted(path)} is quantised, which is not there yet", hint="load the model unquantised")
    if type(module).forward not in FORWARDS and kind != "Conv1D":
        raise Mismatch(f"{quoted(path)} is a {kind}, which does more than its weight says; it is not there yet")
    return module


def _lora(config: LoraConfig, path: str, module: nn.Module) -> Site:
    kind = DoRA if config.use_dora else LoRA
    r = int(lookup(config.rank_pattern, path, config.r))
    alpha = float(lookup(config.alpha_pattern, path, config.lora_alpha))
    tuner = suited(kind(r=r, alpha=alpha, rslora=config.use_rslora, dropout=config.lora_dropout), module)
    params = dict(tuner.init(module))
    plain = not isinstance(module, nn.Embedding)
    if config.init_lora_weights == "gaussian" and plain:
        nn.init.normal_(params["A"], std=1 / r)
    elif config.init_lora_weights is False:
        for letter in "AB":
            params[letter] = _loose(params[letter], plain)
        if config.use_dora:
            params["m"] = norms(LoRA.weight(tuner, module.weight.detach().float(), params), turned(module)).reshape(-1)
    return Site(tuner, params)


def _loose(value: torch.Tensor, plain: bool) -> torch.Tensor:
    """As torch starts a layer of this shape; on an embedding, normal numbers."""
    return nn.init.kaiming_uniform_(value, a=5**0.5) if plain else torch.randn_like(value)


def _ia3(config: IA3Config, path: str, module: nn.Module) -> Site:
    if isinstance(module, (nn.Embedding, nn.Conv1d)):
        raise Mismatch(f"{quoted(path)} is a {type(module).__name__}, on which PEFT's IA3 cannot stand")
    tuner = suited(IA3(feedforward=_feedforward(config.feedforward_modules, path)), module)
    params = dict(tuner.init(module))
    if not config.init_ia3_weights:
        params["l"] = torch.randn_like(params["l"])
    return Site(tuner, params)


def _feedforward(rule: Any, path: str) -> bool:
    if isinstance(rule, str):
        return bool(matching(rule, [path]))
    return any(path.endswith(entry) for entry in rule or ())  # PEFT asks for no dot here
