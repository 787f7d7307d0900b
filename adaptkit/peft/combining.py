"""add_weighted_adapter: one more adapter out of several, by the same algebra as on files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..adapter import Adapter, Site
from ..errors import Mismatch, Usage, quoted
from ..formats.peft.patterns import exactly
from ..live.attach import adapted_modules, is_read, packed, unwrapped
from ..live.tied import Tied
from ..verbs.combine import combined
from . import heads, sites
from .config import IA3Config, LoraConfig, PeftConfig
from .tuners.lora import twice


def weighted(
    model: nn.Module, configs: dict[str, PeftConfig], names: Sequence[str], weights: Sequence[float], **how: Any
) -> tuple[PeftConfig, Adapter]:
    """The settings and the numbers of the combination of adapters that stand on a model.

    Raises Usage for no adapter or another number of weights, and what adaptkit.combine raises.
    """
    if isinstance(names, str) or not names:
        raise Usage("adapters is a list of names of adapters that are there")
    if len(names) != len(weights):
        raise Usage(f"{len(names)} adapters and {len(weights)} weights; give as many weights as adapters")
    made = combined([standing(model, n) for n in names], weights=list(weights), **how)
    made = Adapter({p: _halved(model, p, s) for p, s in made.sites.items()}, made.whole, made.meta, made.about)
    several = [configs[n] for n in names]
    config = _ia3(several) if isinstance(several[0], IA3Config) else _lora(several, made)
    return _aimed(model, config, several, made), made


def standing(model: nn.Module, name: str) -> Adapter:
    """An adapter as it stands on a model, in numbers that training does not reach."""
    modules = {p: m for p, m in adapted_modules(model).items() if name in m.tuners and not isinstance(m, Tied)}
    found = {
        path: Site(*m.tuners[name].kept({k: v.detach() for k, v in m.of(name).items()})) for path, m in modules.items()
    }
    whole = {saved: _numbers(value) for _, saved, value in heads.entries(model, name)}
    numbers = {p: Site(s.tuner, {k: _numbers(v) for k, v in s.params.items()}) for p, s in found.items()}
    return Adapter(numbers, whole, about=packed(modules, name))


def _numbers(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _halved(model: nn.Module, path: str, site: Site) -> Site:
    """An attention's output projection acts twice what its factors say, here as in PEFT."""
    module = unwrapped(model).get(path)
    if module is None or not is_read(module):
        return site
    return Site(twice(site.tuner), {**site.params, "B": site.params["B"] / 2})


def _lora(several: Sequence[Any], made: Adapter) -> LoraConfig:
    """Plain LoRA of scale 1: what made the sources differ is in the numbers."""
    ranks = {p: s.tuner.r for p, s in made.sites.items() if hasattr(s.tuner, "r")}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {exactly(p): n for p, n in ranks.items() if n != r}
    plain = {"use_rslora": False, "use_dora": False, "init_lora_weights": True, "lora_dropout": 0.0}
    plain |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    biased = any("c" in s.params for s in made.sites.values())
    return replace(
        several[0], r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others), lora_bias=biased, **plain
    )


def _ia3(several: Sequence[Any]) -> IA3Config:
    return replace(several[0], exclude_modules=None)


def _aimed(model: nn.Module, config: Any, several: Sequence[Any], made: Adapter) -> PeftConfig:
    """Settings that choose the sites: by the sources' names together where those do, else by the sites' own paths."""
    modules = unwrapped(model)
    paths = {p for p, s in made.sites.items() if p in modules and s.tuner.name != "tokens" and not is_read(modules[p])}
    targets = [c.target_modules for c in several]
    if all(isinstance(t, set) for t in targets):
        config = replace(config, target_modules=set().union(*targets))
        config = (
            config if set(sites.resolved(model, config)) == set(made.sites) else replace(config, target_modules=paths)
        )
    else:
        config = replace(config, target_modules=paths)
    if isinstance(config, IA3Config):
        scaled = {p for p in paths if made.sites[p].tuner.feedforward}
        return replace(config, feedforward_modules=scaled, target_modules=config.target_modules | scaled)
    return config


def checked(names: Sequence[str], configs: dict[str, PeftConfig], new: str) -> None:
    """Raise Usage when the new adapter is there already, which PEFT passes over in silence."""
    if new in configs:
        raise Usage(f"an adapter named {quoted(new)!r} is there already", hint="choose another name, or delete it")
    if missing := [n for n in names if n not in configs]:
        raise Mismatch(f"no adapter is named {quoted(missing[0])}; there are: {', '.join(sorted(configs))}")
