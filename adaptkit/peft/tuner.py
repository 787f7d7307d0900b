"""LoraModel and IA3Model: a model and its adapters by name. The work is done by `live`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from .. import live
from ..adapter import Adapter
from ..errors import AdaptKitWarning, Mismatch, Usage, quoted, some
from ..live import loose
from ..live.attach import enable, unwrapped
from . import combining, heads, sites
from .config import PeftConfig
from .files import checked_name
from .kinds import PeftType
from .tuners import ia3, lora
from .tuners.slots import Slotted


class TunerModel(nn.Module):
    """A model with adapters of one kind.

    model: changed in place; the chosen modules are wrapped.    peft_config: settings, or several by adapter name.
    adapter: numbers that were trained before, for the first name; fresh ones when left out.
    """

    peft_type: ClassVar[PeftType]
    wrap: ClassVar[Any]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        *,
        adapter: Adapter | None = None,
    ):
        super().__init__()
        if live.adapted_modules(model):
            raise Mismatch("this model carries adapters already", hint="call unload on it first, or add_adapter")
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            self.inject(name, config, adapter)
        self.set_adapter(next(iter(configs)), inference_mode=next(iter(configs.values())).inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts; a list when several do."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose updates are in the weights at the moment, in the order in which they went in."""
        return list(dict.fromkeys(n for m in live.adapted_modules(self.model).values() for n in m.merged_adapters))

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules that carry an adapter."""
        return list(live.adapted_modules(self.model))

    def known(self, names: Collection[str]) -> None:
        """Raise Mismatch for a name that no adapter has."""
        if lost := [n for n in names if n not in self.peft_config]:
            there = some(sorted(self.peft_config)) or "none"
            raise Mismatch(f"no adapter is named {some(lost)}; there are: {there}")

    def inject(self, name: str, config: PeftConfig, adapter: Adapter | None = None) -> list[str]:
        """Put one more adapter on, inactive and frozen; the modules that the settings choose."""
        if checked_name(name) in self.peft_config:
            raise Usage(f"an adapter named {quoted(name)!r} is there already", hint="choose another name")
        if config.peft_type != self.peft_type:
            raise Mismatch(f"{quoted(name)} is {config.peft_type}, this model carries {self.peft_type.value}")
        if merged := self.merged_adapters:
            raise Mismatch(f"{some(merged)} is merged into the weights", hint="call unmerge_adapter first")
        chosen = sites.resolved(self.model, config)
        try:
            self._put(name, config, adapter or sites.fresh(self.model, config, chosen))
        except BaseException:
            self._remove(name)
            raise
        self.peft_config[name] = config
        self._activate()
        self.set_requires_grad(name, False)
        return chosen

    def _put(self, name: str, config: PeftConfig, given: Adapter) -> None:
        whole = heads.chosen(self.model, config.modules_to_save or ())
        sites_only = Adapter(given.sites, {}, given.meta, given.about)
        live.attach(self.model, sites_only, name=name, wrap=self.wrap, copy=False)
        copies = heads.train_whole(self.model, name, whole)
        used = heads.load(copies, given.whole)
        biases = self._biases(config, copies)
        others = {p: v for p, v in given.whole.items() if p not in used}
        if biases or others:
            loose.replace(self.model, name, {**dict.fromkeys(biases), **others})

    def _remove(self, name: str) -> None:
        heads.remove(self.model, name)
        if name in live.attached(self.model):
            live.detach(self.model, name)

    def _biases(self, config: PeftConfig, copies: Collection[str]) -> list[str]:
        """The biases that train: all of them, or those of adapted modules; those of copies train there."""
        kind = getattr(config, "bias", "none")
        if kind == "none":
            return []
        adapted = set(live.adapted_modules(self.model))
        return [
            f"{path}.bias" if path else "bias"
            for path, module in unwrapped(self.model).items()
            if module._parameters.get("bias") is not None
            and (kind == "all" or path in adapted)
            and not any(path == c or path.startswith(f"{c}.") for c in copies)
        ]

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.known(names)
        for module in live.adapted_modules(self.model).values():
            for name in names:
                if name in module.tuners and isinstance(module, Slotted):
                    module.train_adapter(name, requires_grad)
        for name in names:
            for copy in (m.modules_to_save[name] for m in heads.of(self.model).values() if name in m.names()):
                copy.requires_grad_(requires_grad)
            if replaced := loose.of(self.model).get(name):
                for path in replaced.aside:
                    replaced.train(self.model, path, requires_grad and path.rpartition(".")[2] == "bias")

    def set_adapter(self, adapter_name: str | Collection[str], inference_mode: bool = False) -> None:
        """Choose the adapters that act, in order; they train, unless inference_mode, and the others do not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.known(names)
        heads.one_each(self.model, names)
        self._unmerged("other adapters were chosen")
        self.active_adapters = names
        self._activate()
        self.set_requires_grad([n for n in self.peft_config if n not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def _activate(self) -> None:
        live.set_active(self.model, self.active_adapters)

    def _unmerged(self, why: str) -> None:
        if merged := self.merged_adapters:
            warnings.warn(f"{some(merged)} was taken out of the weights, since {why}", AdaptKitWarning)
            live.unmerge(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off for good. When it was the only active one, the first of the others becomes active."""
        self.known([adapter_name])
        self._remove(adapter_name)
        del self.peft_config[adapter_name]
        left = [n for n in self.active_adapters if n != adapter_name]
        if not left and self.peft_config:
            left = [min(self.peft_config)]
            warnings.warn(f"{quoted(adapter_name)} was active; now {quoted(left[0])} is", AdaptKitWarning)
            self.set_requires_grad(left)
        self.active_adapters = left
        self._activate()

    def merge_adapter(self, adapter_names: Collection[str] | None = None, safe_merge: bool = False) -> None:
        """Put the updates of adapters into the weights, until unmerge_adapter. Values that overflow are always refused."""
        names = self._mergeable(adapter_names)
        live.merge(self.model, [n for n in names if n in live.attached(self.model)])

    def unmerge_adapter(self) -> None:
        """Give every weight back the bytes it had before merge_adapter."""
        if not live.unmerge(self.model):
            warnings.warn("nothing is merged", AdaptKitWarning)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Collection[str] | None = None
    ) -> nn.Module:
        """The model with the updates in its weights, and no adapter on it."""
        names = self._mergeable(adapter_names)
        heads.one_each(self.model, names)
        live.absorb(self.model, names, watch=_bar(progressbar))
        heads.keep(self.model, names)
        _untied(self.model)
        return self._bare()

    def unload(self) -> nn.Module:
        """The model as it was before it met an adapter."""
        live.unmerge(self.model)
        for name in self.peft_config:
            self._remove(name)
        return self._bare()

    def _bare(self) -> nn.Module:
        self.peft_config, self.active_adapters = {}, []
        return self.model

    def _mergeable(self, adapter_names: Collection[str] | None) -> list[str]:
        """The names to merge, if the merged model computes what the adapted one does."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or self.active_adapters)
        self.known(names)
        if twice := [n for n in names if n in self.merged_adapters]:
            warnings.warn(f"{some(twice)} is merged already", AdaptKitWarning)
        for path, module in live.adapted_modules(self.model).items():
            into = list(dict.fromkeys([*module.merged_adapters, *(n for n in names if n in module.tuners)]))
            late = [n for n in dict.fromkeys(into + module.active) if into and not module.tuners[n].follows]
            if late and late != into[:1]:
                raise Mismatch(
                    f"{some(late)} must be the first change of {quoted(path)}", hint="merge it first, or alone"
                )
        return names

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its adapters; what is merged comes out for the time, and goes back in."""
        merged = self.merged_adapters
        live.unmerge(self.model)
        try:
            with live.disabled(self.model):
                yield
        finally:
            if merged:
                live.merge(self.model, merged)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act, until enable_adapter_layers."""
        self._unmerged("the adapters were disabled")
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        enable(self.model, enabled, self.active_adapters)
        self.set_requires_grad(self.active_adapters, enabled)


class LoraModel(TunerModel):
    """A model with LoRA, rsLoRA or DoRA adapters."""

    peft_type = PeftType.LORA
    wrap = staticmethod(lora.wrap)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int = 0,
    ) -> None:
        """One more adapter, a combination of others; set_adapter makes it act.

        combination_type and the rest: as adaptkit.combine has them. svd_full_matrices and svd_driver change nothing:
        no dense matrix is decomposed whole.    seed: of what dare drops.

        Raises Usage for a name that is there already, and for options that do not go with the combination_type.
        """
        combining.checked(adapters, self.peft_config, adapter_name)
        how: dict[str, Any] = {"method": combination_type, "majority_sign": majority_sign_method, "seed": seed}
        if combination_type.endswith("svd"):  # options of another combination are passed over, as in PEFT
            how |= {"rank": svd_rank, "clamp": svd_clamp}
        if combination_type not in ("svd", "linear", "cat"):
            how["density"] = density
        config, made = combining.weighted(self.model, self.peft_config, adapters, weights, **how)
        self.inject(adapter_name, config, made)


class IA3Model(TunerModel):
    """A model with (IA)^3 adapters."""

    peft_type = PeftType.IA3
    wrap = staticmethod(ia3.wrap)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """One more adapter, l = sum of w l; set_adapter makes it act. An adapter that lacks a module counts as 1 there."""
        combining.checked(adapters, self.peft_config, adapter_name)
        config, made = combining.weighted(self.model, self.peft_config, adapters, weights, method="linear")
        self.inject(adapter_name, config, made)


MODELS: dict[PeftType, type[TunerModel]] = {m.peft_type: m for m in (LoraModel, IA3Model)}


def _bar(shown: bool) -> Any:
    """A progress bar over what is merged, or nothing."""
    if not shown:
        return iter
    from rich.progress import track

    return lambda modules: track(modules, description="merging", transient=True)


def _untied(model: nn.Module) -> None:
    """Say in the model's settings that its ends are two weights now, so that loading it does not make them one again."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    ends = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    if len(ends) == 2 and ends[0].weight is not ends[1].weight:
        config.tie_word_embeddings = False
        warnings.warn("an adapter changed one of two tied ends; they are untied now", AdaptKitWarning)
