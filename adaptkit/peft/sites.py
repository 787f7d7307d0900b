"""From settings to sites: which modules of a model, and the fresh numbers for each."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, Site
from ..errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ..formats.peft.patterns import lookup, unmatched
from ..live.attach import PLAIN, adaptable, bare, is_read, suited, turned, unwrapped
from ..select import Select, matching, unused
from ..tuners.dora import DoRA, norms
from ..tuners.experts import LAYOUT, ExpertLoRA
from ..tuners.ia3 import IA3
from ..tuners.lora import LoRA
from ..tuners.spectral import OLoRA, PiSSA
from ..tuners.tokens import Tokens
from . import defaults
from .config import NITER, IA3Config, LoraConfig, PeftConfig
from .kinds import TaskType
from .starts import begun, loosely, start, twice

FORWARDS = {kind.forward for kind in PLAIN}
HEADS = ("score", "classifier")


def resolved(model: nn.Module, config: PeftConfig) -> list[str]:
    """The paths that the settings choose, in the model's order; fills in what the settings leave to the model.

    Of modules, then of bare parameters.
    """
    modules = unwrapped(model)
    names = [p for p in modules if p]
    parameters = _parameters(config, modules)
    given = config.target_modules
    if given is not None and not given and not parameters:
        raise Usage("target_modules is empty", hint="name modules, or leave it out for the model's default")
    if given is None and not parameters:
        _by_default(model, config)
    elif isinstance(given, str) and given.lower() == "all-linear":
        config.target_modules = set(_all_linear(model, config))
        _stacks_told(config, modules)
    chosen = _selection(config)(names) if config.target_modules or not parameters else []
    _unused(given, config.exclude_modules, names)
    config.fan_in_fan_out = any(type(modules[p]).__name__ == "Conv1D" for p in chosen)
    tokens = _of_tokens(model, config, modules)
    if both := [p for p in chosen if p in tokens]:
        raise Mismatch(f"{some(both)} is in target_modules and in trainable_token_indices", hint="do one or the other")
    return [*_with_outputs(chosen, modules), *parameters, *tokens]


def fresh(model: nn.Module, config: PeftConfig, chosen: list[str]) -> Adapter:
    """Numbers to start from, for each path chosen."""
    modules = unwrapped(model)
    if isinstance(config, IA3Config):
        return Adapter(sites={p: _ia3(config, p, checked(p, modules)) for p in chosen})
    unmatched(asdict(config), chosen)
    tokens = _of_tokens(model, config, modules)
    sites = {}
    for path in chosen:
        if path in tokens:
            sites[path] = _tokens(tokens[path], modules[path])
        elif path not in modules:
            sites[path] = _of_parameter(config, path, modules)
        else:
            sites[path] = _of_module(config, path, modules)
    return Adapter(sites=sites, about={"peft_version": LAYOUT})


def _of_module(config: LoraConfig, path: str, modules: dict[str, nn.Module]) -> Site:
    if isinstance(modules[path], nn.MultiheadAttention):
        lora(config, f"{path}.out_proj", modules[f"{path}.out_proj"])  # PEFT starts it twice
    site = lora(config, path, checked(path, modules))
    return Site(twice(site.tuner), site.params) if is_read(modules[path]) else site


def _with_outputs(chosen: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """With an nn.MultiheadAttention comes its output projection, whose weight is read and never called."""
    found = []
    for path in chosen:
        if is_read(modules[path]) and path.rpartition(".")[0] in chosen:
            continue
        found.append(path)
        if isinstance(modules[path], nn.MultiheadAttention):
            found.append(f"{path}.out_proj")
    return found


def _parameters(config: PeftConfig, modules: dict[str, nn.Module]) -> list[str]:
    """The bare parameters that target_parameters names, in the order in which they are registered."""
    targets = getattr(config, "target_parameters", None) or []
    paths = [f"{path}.{leaf}" if path else leaf for path, m in modules.items() for leaf in m._parameters]
    hits = matching(list(targets), paths)
    if lost := [t for t in targets if not matching([t], paths)]:
        raise Mismatch(f"target_parameters: no parameter is called {some(lost)}")
    return [p for p in paths if p in hits]


def _of_tokens(model: nn.Module, config: PeftConfig, modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """The embeddings some of whose rows train, with their indices."""
    given = getattr(config, "trainable_token_indices", None)
    if not given:
        return {}
    if not isinstance(given, dict):
        embedding = bare(model.get_input_embeddings())
        return {next(p for p, m in modules.items() if m is embedding): list(given)}
    found = {}
    for name, index in given.items():
        paths = matching([name], list(modules))
        if not paths:
            raise Mismatch(f"trainable_token_indices: no module is called {quoted(name)}")
        found |= {path: list(index) for path in paths}
    return found


def _tokens(index: list[int], module: nn.Module) -> Site:
    rows = len(getattr(module, "weight", ()))
    if len(set(index)) != len(index) or not all(0 <= i < rows for i in index):
        raise Usage(f"trainable_token_indices names a token twice, or one outside of the {rows} there are")
    at = torch.tensor(index, dtype=torch.long)
    return Site(Tokens(), {"index": at, "rows": module.weight.detach()[at.to(module.weight.device)].float().clone()})


def _of_parameter(config: LoraConfig, path: str, modules: dict[str, nn.Module]) -> Site:
    """LoRA on a bare matrix, or on a stack of them. A: (r E, in)   B: (out, r E)"""
    parent, _, leaf = path.rpartition(".")
    module = modules[parent]
    shape = module._parameters[leaf].shape
    if len(shape) not in (2, 3):
        raise Mismatch(f"{quoted(path)} is {list(shape)}; target_parameters takes matrices and stacks of them")
    turned_ = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    experts, (out, into) = (shape[0] if len(shape) == 3 else 1), shape[-2:][::-1] if turned_ else shape[-2:]
    r = int(lookup(config.rank_pattern, path, config.r))
    alpha = float(lookup(config.alpha_pattern, path, config.lora_alpha))
    tuner = ExpertLoRA(r=r, alpha=alpha, rslora=config.use_rslora, transposed=turned_)
    if config.init_lora_weights in ("orthogonal", "pissa", "olora") or NITER.fullmatch(str(config.init_lora_weights)):
        raise Mismatch(f"init_lora_weights={config.init_lora_weights!r} does not go with target_parameters")
    params = begun(config.init_lora_weights, loosely((r * experts, into), (out, r * experts)), tuner)
    return Site(tuner, {k: v.to(module._parameters[leaf].device, torch.float32) for k, v in params.items()})


def _by_default(model: nn.Module, config: PeftConfig) -> None:
    if isinstance(config, IA3Config):
        targets, feedforward = defaults.of_model(defaults.IA3, model)
        config.target_modules = set(targets)
        if config.feedforward_modules is None:
            config.feedforward_modules = set(feedforward)
    else:
        targets = defaults.of_model(defaults.LORA, model)
        config.target_modules = targets if isinstance(targets, str) else set(targets)


def _all_linear(model: nn.Module, config: PeftConfig) -> list[str]:
    """Every linear layer but the head, which is the output embedding or what a task trains as a whole."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {id(bare(head))} if head is not None else set()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        heads |= {id(bare(m)) for n in HEADS if (m := getattr(model, n, None)) is not None}
    whole = tuple(config.modules_to_save or ())
    return [
        p
        for p, m in unwrapped(model).items()
        if ((isinstance(m, nn.Linear) and not is_read(m)) or type(m).__name__ == "Conv1D")
        and id(m) not in heads
        and not p.endswith(whole or "\0")
    ]


def _stacks_told(config: PeftConfig, modules: dict[str, nn.Module]) -> None:
    """Warn of experts that "all-linear" does not reach: most of a model, which an older one had in linear layers."""
    stacks = [m for m in modules.values() if type(m).__name__.endswith("Experts")]
    leaves = list(dict.fromkeys(n for m in stacks for n, p in m._parameters.items() if p is not None and p.ndim == 3))
    if leaves and not getattr(config, "target_parameters", None):
        warnings.warn(
            f"all-linear does not reach experts that are one tensor: {some(leaves)}; name them in target_parameters",
            AdaptKitWarning,
            stacklevel=4,
        )


def _selection(config: PeftConfig) -> Select:
    layers = getattr(config, "layers_to_transform", None)
    layers = [layers] if isinstance(layers, int) else layers
    targets = config.target_modules
    which = {"pattern": targets} if isinstance(targets, str) else {"names": targets}
    pattern = getattr(config, "layers_pattern", None)
    return Select(**which, layers=layers, layers_pattern=pattern, exclude=config.exclude_modules)


def _unused(targets: Any, exclude: Any, names: list[str]) -> None:
    for field, rule in (("target_modules", targets), ("exclude_modules", exclude)):
        if lost := unused(rule if isinstance(rule, set) else (), names):
            warnings.warn(f"{field}: no module is called {some(lost)}", AdaptKitWarning, stacklevel=4)


def checked(path: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The module, if an adapter beside it computes what one inside its weight would. Raises Mismatch with the reason."""
    module, kind = modules[path], type(modules[path]).__name__
    if isinstance(modules.get(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise Mismatch(f"{quoted(path)} stands in nn.TransformerEncoderLayer, whose fast path goes around its layers")
    if isinstance(module, nn.MultiheadAttention) or is_read(module):
        return module
    if not adaptable(module):
        raise Mismatch(f"{quoted(path)} is a {kind}, on which no adapter can stand")
    if not module.weight.is_floating_point() or module.weight.dtype.itemsize < 2:
        raise Mismatch(f"{quoted(path)} is quantised, which is not there yet", hint="load the model unquantised")
    if type(module).forward not in FORWARDS and kind != "Conv1D":
        raise Mismatch(f"{quoted(path)} is a {kind}, which does more than its weight says; it is not there yet")
    return module


def lora(config: LoraConfig, path: str, module: nn.Module) -> Site:
    """Fresh numbers for one module, as the settings want them started."""
    kind, more = _kind(config)
    r = int(lookup(config.rank_pattern, path, config.r))
    alpha = float(lookup(config.alpha_pattern, path, config.lora_alpha))
    settings = {"r": r, "alpha": alpha, "rslora": config.use_rslora, "dropout": config.lora_dropout, **more}
    if isinstance(module, nn.Embedding) and kind in (PiSSA, OLoRA):
        kind, settings = LoRA, {k: v for k, v in settings.items() if k not in more}  # PEFT starts those plainly
    tuner = suited(kind(**settings), module)
    if isinstance(module, nn.MultiheadAttention):
        tuner, module = _joint(config, tuner, path, module)
    if config.lora_bias and getattr(module, "bias", None) is None:
        raise Mismatch(f"lora_bias: {quoted(path)} has no bias to merge into", hint="leave it out, or lora_bias")
    params = start(config, tuner, module)
    if config.use_dora and config.init_lora_weights is False:
        params["m"] = norms(LoRA.weight(tuner, module.weight.detach().float(), params), turned(module)).reshape(-1)
    return Site(tuner, params)


def _kind(config: LoraConfig) -> tuple[type[LoRA], dict[str, Any]]:
    start = str(config.init_lora_weights)
    if found := NITER.fullmatch(start):
        kind, more = PiSSA, {"niter": int(found[1])}
    else:
        kind, more = {"pissa": PiSSA, "olora": OLoRA}.get(start, DoRA if config.use_dora else LoRA), {}
    if config.use_dora and kind is not DoRA:
        raise Mismatch(f"use_dora with init_lora_weights={start!r} is not there yet")
    return kind, more


def _joint(config: LoraConfig, tuner: LoRA, path: str, module: nn.MultiheadAttention) -> tuple[LoRA, Any]:
    """The joint projection of an nn.MultiheadAttention, as if it were a linear layer."""
    if module.in_proj_weight is None:
        raise Mismatch(f"{quoted(path)} has three projections of different widths, on which no adapter can stand")
    if off := [n for n in ("lora_dropout", "use_dora", "lora_bias") if getattr(config, n)]:
        raise Usage(
            f"{off[0]} does not go with {quoted(path)}, an nn.MultiheadAttention: its weight is read, not called"
        )
    return tuner, SimpleNamespace(weight=module.in_proj_weight)


def _ia3(config: IA3Config, path: str, module: nn.Module) -> Site:
    if isinstance(module, (nn.Embedding, nn.Conv1d)):
        raise Mismatch(f"{quoted(path)} is a {type(module).__name__}, on which PEFT's IA3 cannot stand")
    tuner = suited(IA3(feedforward=_feedforward(config.feedforward_modules, path)), module)
    params = dict(tuner.init(module))
    drawn = torch.randn(params["l"].shape)  # PEFT draws it in any case: what comes after it at one seed is the same
    if not config.init_ia3_weights:
        params["l"] = drawn.to(params["l"])
    return Site(tuner, params)


def _feedforward(rule: Any, path: str) -> bool:
    if isinstance(rule, str):
        return bool(matching(rule, [path]))
    return any(path.endswith(entry) for entry in rule or ())  # PEFT asks for no dot here
